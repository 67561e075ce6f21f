"""The optimizer files of a checkpoint as the ranks of another (pipeline, tensor, data) shape would see them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch

from zeropipe.checkpoint import constants as k
from zeropipe.checkpoint.reshape_3d_utils import get_model_3d_descriptor, model_3d_desc
from zeropipe.checkpoint.reshape_meg_2d import log_table
from zeropipe.checkpoint.reshape_utils import basic_folder_validation, get_zero_files, merge_state, rank_file
from zeropipe.checkpoint.save.files import FragmentAddress
from zeropipe.checkpoint.save.records import FP32
from zeropipe.checkpoint.sources import Flat
from zeropipe.checkpoint.sources.deepspeed import ALIGN
from zeropipe.errors import CheckpointError
from zeropipe.layout.flat import FlatShards, TensorSpec


class ZeROCheckpoint:
    """Stage 1 and 2 optimizer files, ours or DeepSpeed's, of a tag's folder.

    Raises CheckpointError when there are none, or their number does not fit the degrees.
    """

    def __init__(self, dir: str, source_3d: model_3d_desc | None = None) -> None:
        basic_folder_validation(dir)
        self.dir = dir
        self.file_list = get_zero_files(dir)
        self.num_files = len(self.file_list)
        if not self.num_files:
            raise CheckpointError(f"{dir} has no ZeRO files", expected="zero_pp_rank_*_optim_states.pt")
        self.src_3d = source_3d or get_model_3d_descriptor(dir)
        # Files are found by their number in the grid: one that lacks would shift all that follow.
        if self.src_3d.world_size() != self.num_files:
            raise CheckpointError(
                f"{dir} does not have one optimizer file per rank",
                expected=f"{self.src_3d.world_size()} files for {self.src_3d.get_desc()}",
                found=self.num_files,
                fix="copy all ranks' files into one folder, or give source_3d",
            )
        self.target_3d = self.src_3d
        self._map = self.src_3d.reshape(self.src_3d)

    def get_src_world_size(self) -> int:
        return self.src_3d.world_size()

    def get_src_tp_degree(self) -> int:
        return self.src_3d.tp_degree

    def get_src_pp_degree(self) -> int:
        return self.src_3d.pp_degree

    def get_src_dp_degree(self) -> int:
        return self.src_3d.dp_degree

    def reshape(self, target_3d_desc: model_3d_desc) -> None:
        """See the files as ranks of ``target_3d_desc`` from now on, more ranks or fewer."""
        self._map = self.src_3d.reshape(target_3d_desc)
        self.target_3d = target_3d_desc

    def get_file_indices_for_rank(self, pp_index: int, tp_index: int, dp_index: int) -> list[int]:
        """Numbers of the source files that hold (parts of) a target rank's state."""
        valid, errors = self.target_3d.is_valid(pp_index, tp_index, dp_index)
        if not valid:
            raise CheckpointError("; ".join(errors))
        return self._map[dp_index].get_data(pp_index, tp_index)

    def get_files_for_rank(self, pp_index: int, tp_index: int, dp_index: int) -> list[str]:
        return [self.file_list[i] for i in self.get_file_indices_for_rank(pp_index, tp_index, dp_index)]

    def get_state_for_rank(
        self,
        pp_index: int,
        tp_index: int,
        dp_index: int,
        keys_to_ignore: Sequence[str] = (),
        strip_tensor_paddings: bool = True,
    ) -> dict[str, Any]:
        """A target rank's optimizer file as one dict.

        Where only the data degree differs, the flat shards are cut anew exactly, up or down. Where pipeline or
        tensor ranks are joined, their shards lie end to end. ``strip_tensor_paddings``: without the padding at
        the end of the last shard. Raises CheckpointError, with a tensor's name, for more pipeline or tensor
        ranks than there were: flat shards cannot be cut so.
        """
        self._check_down(pp_index, tp_index)
        indices = self.get_file_indices_for_rank(pp_index, tp_index, dp_index)
        per_mp = self.src_3d.pp_degree * self.src_3d.tp_degree
        source = (self.src_3d.pp_degree, self.src_3d.tp_degree)
        # [1] Other data ranks: all peers of one model-parallel rank hold one buffer, cut anew to the element.
        if source == (self.target_3d.pp_degree, self.target_3d.tp_degree):
            member = indices[0] % per_mp
            peers = [self._load(member + dp * per_mp, keys_to_ignore) for dp in range(self.src_3d.dp_degree)]
            return self._recut(peers, dp_index, self.target_3d.dp_degree, strip_tensor_paddings)
        # [2] Fewer model-parallel ranks: theirs are other buffers, which lie end to end from now on.
        # Each is cut as one of one shards, so that only its padding changes.
        loaded = ([self._load(index, keys_to_ignore)] for index in indices)
        return reduce(_end_to_end, (self._recut(one, 0, 1, strip_tensor_paddings) for one in loaded))

    def _check_down(self, pp_index: int, tp_index: int) -> None:
        source, target = self.src_3d, self.target_3d
        if target.pp_degree <= source.pp_degree and target.tp_degree <= source.tp_degree:
            return
        file = self.get_files_for_rank(pp_index, tp_index, 0)[0]
        inner = rank_file(file).get(k.OPTIMIZER_STATE_DICT, {})
        names = [name for group in inner.get(k.PARAM_SLICE_MAPPINGS) or () for name in group]
        raise CheckpointError(
            f"the optimizer state of {names[0] if names else 'the parameters'} in {file} lies in a flat shard, "
            "which cannot be cut for more ranks",
            expected=f"at most {source.get_desc()}",
            found=target.get_desc(),
            fix="`zeropipe ckpt convert --tp N` for tensor parallelism; a pipeline engine loads at any size",
        )

    def print_3d_index_map(self, tag: str | None = None) -> None:
        """Log which source files each target rank takes."""
        log_table(self._by_rank(), f"3D {tag or 'index map'}")

    def print_3d_file_map(self, tag: str | None = None) -> None:
        files = {rank: [self.file_list[i] for i in data] for rank, data in self._by_rank().items()}
        log_table(files, f"3D {tag or 'file map'}")

    def _by_rank(self) -> dict[str, list[int]]:
        grids = enumerate(self._map)
        return {f"{pp}, {tp}, {dp}": data for dp, g in grids for (pp, tp), data in sorted(g.map.items())}

    def _load(self, index: int, keys_to_ignore: Sequence[str]) -> dict[str, Any]:
        state = {key: v for key, v in rank_file(self.file_list[index]).items() if key not in keys_to_ignore}
        inner = state.get(k.OPTIMIZER_STATE_DICT) or {}
        kept = {key: value for key, value in inner.items() if key not in keys_to_ignore}
        return state | {k.OPTIMIZER_STATE_DICT: kept} if kept else state

    def _recut(self, states: list[dict[str, Any]], dp_index: int, count: int, strip: bool) -> dict[str, Any]:
        """The first state with every flat tensor replaced by the target's shard of it."""
        inner = dict(states[0][k.OPTIMIZER_STATE_DICT])
        every = [s[k.OPTIMIZER_STATE_DICT] for s in states]
        base = dict(inner.get(k.BASE_OPTIMIZER_STATE) or {})
        groups = inner.get(k.SINGLE_PARTITION_OF_FP32_GROUPS)
        # Stage 3 has no flat groups; what is asked for as it is can be given all the same.
        if groups is None:
            if len(states) == count == 1:
                return states[0]
            raise CheckpointError(
                f"{self.dir} is of stage 3, whose shards are per parameter",
                fix="load it with engine.load_checkpoint, or `zeropipe ckpt convert` it",
            )
        moments = dict(base.get("state", {}))
        new_groups = []
        for group in range(len(groups)):
            shards = []
            for state in every:
                held = state[k.BASE_OPTIMIZER_STATE].get("state", {}).get(group, {}).items()
                own = {key: t for key, t in held if isinstance(t, torch.Tensor) and t.dim() == 1}
                shards.append({FP32: state[k.SINGLE_PARTITION_OF_FP32_GROUPS][group]} | own)
            # DeepSpeed writes the masters without their padding, the moments with it.
            full = [max(tensor.numel() for tensor in shard.values()) for shard in shards]
            padding = sum((s.get(k.GROUP_PADDINGS) or [0] * len(groups))[group] for s in every)
            # All tensors of the group as one: where they lie in it does not change, only where it is cut.
            spec = TensorSpec("flat", (sum(full) - padding,), "")
            layout = FlatShards((spec,), len(shards), max(1, *full))
            flat = Flat.of("flat", 0, group, layout, shards, {})
            cut = {key: _cut(flat, key, dp_index, count, strip) for key in flat.keys}
            new_groups.append(cut.pop(FP32))
            if group in moments:
                moments[group] = moments[group] | cut
        inner[k.SINGLE_PARTITION_OF_FP32_GROUPS] = new_groups
        if base:
            inner[k.BASE_OPTIMIZER_STATE] = base | {"state": moments}
        if k.PARTITION_COUNT in inner:
            inner[k.PARTITION_COUNT] = [self.target_3d.dp_degree] * len(groups)
        if k.GROUP_PADDINGS in inner and strip:
            inner[k.GROUP_PADDINGS] = [0] * len(groups)
        return dict(states[0]) | {k.OPTIMIZER_STATE_DICT: inner}


def _end_to_end(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Two ranks' states as one: their flat tensors end to end, the addresses in them moved along."""
    a, b = dict(left[k.OPTIMIZER_STATE_DICT]), dict(right[k.OPTIMIZER_STATE_DICT])
    mine, theirs = a.pop(k.PARAM_SLICE_MAPPINGS, None), b.pop(k.PARAM_SLICE_MAPPINGS, None)
    merged = merge_state(left | {k.OPTIMIZER_STATE_DICT: a}, right | {k.OPTIMIZER_STATE_DICT: b})
    # Slices of one tensor lie apart then, so there is no address for it.
    if mine and theirs and not any(x.keys() & y.keys() for x, y in zip(mine, theirs, strict=False)):
        sizes = [t.numel() for t in a[k.SINGLE_PARTITION_OF_FP32_GROUPS]]
        merged[k.OPTIMIZER_STATE_DICT][k.PARAM_SLICE_MAPPINGS] = [
            dict(x) | {name: FragmentAddress(at.numel, at.start + size) for name, at in y.items()}
            for x, y, size in zip(mine, theirs, sizes, strict=True)
        ]
    return merged


def _cut(flat: Flat, key: str, index: int, count: int, strip: bool) -> torch.Tensor:
    """Shard ``index`` of ``count`` of what the flat's shards hold end to end."""
    target = flat.layout if count == flat.layout.num_shards else flat.layout.reshard(count, ALIGN)
    start, held = index * target.shard_numel, target.held(index)
    run = flat.run("flat", key, start, start + held)
    return run if strip else torch.cat([run, run.new_zeros(target.shard_numel - held)])
