"""A pipeline checkpoint of layer files, seen at other tensor, pipeline and data degrees without an engine.

Layers: the first file is the embedding, ``final_layer_norm_idx`` the final norm, all between are transformer layers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property, reduce
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint import constants as k
from zeropipe.checkpoint.reshape_3d_utils import get_model_3d_descriptor, model_3d_desc
from zeropipe.checkpoint.reshape_meg_2d import log_table, meg_2d_parallel_map, reshape_2d_map
from zeropipe.checkpoint.reshape_utils import (
    basic_folder_validation,
    get_files,
    get_files_with_prefix,
    get_zero_files,
    merge_state,
    rank_file,
    share,
    slice_of,
    unite,
    validate_files,
)
from zeropipe.checkpoint.save.files import load_torch
from zeropipe.checkpoint.sources.deepspeed import LAYER
from zeropipe.checkpoint.universal_checkpoint import LAYER_CONCAT_DIM as LAYER_CONCAT_DIM
from zeropipe.checkpoint.universal_checkpoint import SEQUENTIAL_LAYERS as SEQUENTIAL_LAYERS
from zeropipe.checkpoint.universal_checkpoint import rules_in
from zeropipe.checkpoint.zero_checkpoint import ZeROCheckpoint
from zeropipe.errors import CheckpointError

EMBEDDING_LAYER_INDEX = 0
ARGS_KEY = "args"
ITERATION_KEY = "iteration"
CHECKPOINT_INFO_KEY = "checkpoint_info"


class DeepSpeedCheckpoint:
    """``dir`` is a tag's folder; degrees left out are those that it was saved with.

    Raises CheckpointError when files are missing or a degree neither divides the old one nor is a multiple of it.
    """

    def __init__(
        self,
        dir: str,
        tp_degree: int | None = None,
        pp_degree: int | None = None,
        dp_degree: int | None = None,
        final_layer_norm_idx: int = -1,
    ) -> None:
        basic_folder_validation(dir)
        self.dir = dir
        self.final_layer_norm_idx = final_layer_norm_idx
        self.global_state: dict[str, Any] = {}

        # The files, and the degrees that they were saved at.
        self.file_list = get_files(dir)
        layers = (file for file in self.file_list if LAYER.match(os.path.basename(file)))
        self.layer_files = sorted(layers, key=_layer_numbers)
        self.mp_rank_files = get_files_with_prefix(self.file_list, k.MODEL_FILE_PREFIX)
        self.zero_files = get_zero_files(dir)
        self.src_3d = source = get_model_3d_descriptor(dir)
        self.original_tp_degree = source.tp_degree
        self.original_pp_degree = source.pp_degree
        self.original_dp_degree = source.dp_degree
        self.original_world_size = source.world_size()

        # The degrees that they are seen at, and who takes from whom there.
        self.tp_degree = tp_degree or source.tp_degree
        self.pp_degree = pp_degree or source.pp_degree
        self.dp_degree = dp_degree or source.dp_degree
        target = model_3d_desc(self.pp_degree, self.tp_degree, self.dp_degree)
        self.world_size = target.world_size()
        fits, errors = source.can_reshape(target)
        if not fits:
            raise CheckpointError(f"{dir}: " + "; ".join(errors))
        # Stage 0 keeps its optimizer in the model files.
        self.zero_checkpoint = ZeROCheckpoint(dir, source) if self.zero_files else None
        if self.zero_checkpoint is not None:
            self.zero_checkpoint.reshape(target)
        self.old_2d_map = meg_2d_parallel_map(source.pp_degree, source.tp_degree)
        self.old_2d_map.simple_init()
        self.new_2d_map = reshape_2d_map(self.old_2d_map, self.pp_degree, self.tp_degree)

        # Layers by number, each a file of every old tensor rank; a new one takes its share of them.
        self._files: dict[int, list[str]] = {}
        for file in self.layer_files:
            self._files.setdefault(_layer_numbers(file)[0], []).append(file)
        self.layer_keys = list(self._files)
        self.layer_count = len(self.layer_keys)
        shares = {number: share(files, self.tp_degree) for number, files in self._files.items()}

        def by_tp(index: int) -> dict[int, list[str]]:
            return dict(enumerate(shares[self.layer_keys[index]])) if shares else {}

        self.tp_to_embedding_map = by_tp(EMBEDDING_LAYER_INDEX)
        self.tp_to_final_norm_map = by_tp(final_layer_norm_idx)
        # All between are transformer layers: every pipeline stage has as many.
        last = final_layer_norm_idx % max(self.layer_count, 1)
        between = self.layer_keys[EMBEDDING_LAYER_INDEX + 1 : last]
        if len(between) % self.pp_degree:
            raise CheckpointError(
                f"{len(between)} transformer layers cannot be shared out",
                expected="a divisor as pipeline degree",
                found=self.pp_degree,
            )
        self._stages = dict(enumerate(share(between, self.pp_degree))) if between else {}
        self.pp_to_transformer_map = {pp: list(map(_layer_id, run)) for pp, run in self._stages.items()}
        self.transformer_file_map = {
            (tp, pp): [shares[number][tp] for number in run]
            for pp, run in self._stages.items()
            for tp in range(self.tp_degree)
        }

    # What changes.

    def is_change_tp_degree(self) -> bool:
        return self.tp_degree != self.original_tp_degree

    def is_change_pp_degree(self) -> bool:
        return self.pp_degree != self.original_pp_degree

    def is_change_dp_degree(self) -> bool:
        return self.dp_degree != self.original_dp_degree

    # Maps, for reading and for the log.

    def show_2d_mapping(self) -> None:
        log_table(self.new_2d_map.map, "Dump mapping: reshaped_2d_map")

    def show_tp_embedding_map(self) -> None:
        log_table(self.tp_to_embedding_map, "Dump mapping: tp_to_embedding_layers")

    def show_tp_final_norm_map(self) -> None:
        log_table(self.tp_to_final_norm_map, "Dump mapping: tp_to_final_norm_layers")

    def show_pp_transformer_map(self) -> None:
        log_table(self.pp_to_transformer_map, "Dump mapping: pp_to_transformer_layers")

    def show_transformer_file_map(self) -> None:
        log_table(self.transformer_file_map, "Dump mapping: rank_to_transformer_files")

    def get_embedding_layer_id(self) -> str:
        return _layer_id(self.layer_keys[EMBEDDING_LAYER_INDEX])

    def get_final_norm_layer_id(self) -> str:
        return _layer_id(self.layer_keys[self.final_layer_norm_idx])

    def get_embedding_files(self, tp_index: int) -> list[str]:
        return _known(self.tp_to_embedding_map, tp_index, "tp_index")

    def get_final_norm_files(self, tp_index: int) -> list[str]:
        return _known(self.tp_to_final_norm_map, tp_index, "tp_index")

    def get_pp_transformer_map(self, pp_index: int) -> list[str]:
        """Names of the layers of a pipeline stage."""
        return _known(self.pp_to_transformer_map, pp_index, "pp_index")

    def get_2d_parallel_files(self, tp_index: int, pp_index: int) -> list[str]:
        """The model files that a (tensor, pipeline) rank takes its state from."""
        return [self.mp_rank_files[rank] for rank in self.new_2d_map.get_data(pp_index, tp_index)]

    def get_zero_files(self, pp_index: int, tp_index: int, dp_index: int) -> list[str]:
        return self._need_zero().get_files_for_rank(pp_index, tp_index, dp_index)

    def validate_files(self) -> None:
        """Raises CheckpointError naming the first file that is gone."""
        validate_files(self.file_list)

    # State.

    def get_zero_checkpoint_state(
        self, pp_index: int, tp_index: int, dp_index: int, strip_tensor_paddings: bool = True
    ) -> dict[str, Any]:
        return self._need_zero().get_state_for_rank(
            pp_index, tp_index, dp_index, [k.PARAM_SHAPES, k.PARAM_SLICE_MAPPINGS], strip_tensor_paddings
        )

    def get_embedding_state(self, tp_index: int) -> dict[str, Any]:
        self.get_embedding_files(tp_index)  # refuses an index out of range
        return self._layer(self.layer_keys[EMBEDDING_LAYER_INDEX], tp_index)

    def get_final_norm_state(self, tp_index: int) -> dict[str, Any]:
        """The first file's: the norm is whole on every rank."""
        return dict(load_torch(Path(self.get_final_norm_files(tp_index)[0])))

    def get_transformer_state(self, tp_index: int, pp_index: int) -> list[dict[str, Any]]:
        """One state dict per layer of a (tensor, pipeline) rank."""
        return [self._layer(number, tp_index) for number in _known(self._stages, pp_index, "pp_index")]

    def get_2d_parallel_state(self, tp_index: int, pp_index: int) -> dict[str, Any]:
        """The model file of a (tensor, pipeline) rank: several merged into one, or one whose module is cut."""
        ranks = self.new_2d_map.get_data(pp_index, tp_index)
        stages = groupby(ranks, key=lambda rank: rank // self.original_tp_degree)
        # Ranks of a stage hold slices of the same tensors, stages hold other tensors.
        states = (self._stage(stage, list(members), tp_index) for stage, members in stages)
        united: dict[str, Any] = reduce(unite, states)
        return united

    def _stage(self, stage: int, ranks: list[int], tp_index: int) -> dict[str, Any]:
        merged: dict[str, Any] = reduce(merge_state, (rank_file(self.mp_rank_files[rank]) for rank in ranks))
        if self.tp_degree <= self.original_tp_degree:
            return merged
        # A larger degree's part of what the model files of a stage hold of the module.
        first = stage * self.original_tp_degree
        files = self.mp_rank_files[first : first + self.original_tp_degree]
        modules = [rank_file(file).get("module") for file in files]
        return merged | {"module": None if modules[0] is None else self._parts(modules, tp_index)}

    def get_iteration(self) -> int:
        """The trainer's iteration count, 0 where it left none."""
        return int(self._common(ITERATION_KEY) or 0)

    def get_args(self) -> Any:
        """The trainer's arguments, None where it left none."""
        return self._common(ARGS_KEY)

    def get_checkpoint_info(self, info_key: str = CHECKPOINT_INFO_KEY) -> Any:
        return self._common(info_key)

    def _common(self, key: str) -> Any:
        if key not in self.global_state:
            self.global_state[key] = rank_file(self.mp_rank_files[0]).get(key) if self.mp_rank_files else None
        return self.global_state[key]

    def _need_zero(self) -> ZeROCheckpoint:
        if self.zero_checkpoint is None:
            raise CheckpointError(f"{self.dir} has no ZeRO files", expected="*_optim_states.pt")
        return self.zero_checkpoint

    def _layer(self, number: int, tp_index: int) -> dict[str, Any]:
        """A new tensor rank's part of a layer."""
        states = [load_torch(Path(file)) for file in self._files[number]]
        return self._parts(states, tp_index, f"{number}.")

    def _parts(self, states: Sequence[Any], tp_index: int, prefix: str = "") -> dict[str, Any]:
        """``prefix``: what the names have before them in the module, which the rules go by."""
        # What is no tensor is the same on all ranks.
        count = self.tp_degree
        return {
            key: slice_of(prefix + key, [state[key] for state in states], tp_index, count, self._rules)
            if isinstance(first, torch.Tensor)
            else first
            for key, first in states[0].items()
        }

    @cached_property
    def _rules(self) -> dict[str, Any] | None:
        """What the files say of how their tensors are cut."""
        return rules_in(rank_file(self.mp_rank_files[0])) if self.mp_rank_files else None


def _known(table: dict[int, Any], index: int, what: str) -> list[Any]:
    if index not in table:
        raise CheckpointError(what, expected=f"below {len(table)}", found=index)
    return list(table[index])


def _layer_id(number: int) -> str:
    return f"{k.LAYER_FILE_PREFIX}{number:02d}"


def _layer_numbers(path: str) -> tuple[int, int]:
    match = LAYER.match(os.path.basename(path))
    assert match is not None
    return int(match[1]), int(match[2] or 0)
