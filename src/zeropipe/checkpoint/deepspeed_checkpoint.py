"""A pipeline checkpoint of layer files, seen at other tensor, pipeline and data degrees without an engine.

Layers: the first file is the embedding, ``final_layer_norm_idx`` the final norm, all between are transformer layers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint import constants as k
from zeropipe.checkpoint.reshape_3d_utils import get_model_3d_descriptor, model_3d_desc
from zeropipe.checkpoint.reshape_meg_2d import meg_2d_parallel_map, reshape_meg_2d_parallel
from zeropipe.checkpoint.reshape_utils import (
    basic_folder_validation,
    get_files,
    get_files_with_prefix,
    get_zero_files,
    merge_state,
    partition_data,
    share,
    slice_of,
    unite,
    validate_files,
)
from zeropipe.checkpoint.save.contents import OURS
from zeropipe.checkpoint.save.files import load_torch
from zeropipe.checkpoint.sources.deepspeed import LAYER
from zeropipe.checkpoint.universal_checkpoint import LAYER_CONCAT_DIM as LAYER_CONCAT_DIM
from zeropipe.checkpoint.universal_checkpoint import SEQUENTIAL_LAYERS as SEQUENTIAL_LAYERS
from zeropipe.checkpoint.universal_checkpoint import rules_in
from zeropipe.checkpoint.zero_checkpoint import ZeROCheckpoint
from zeropipe.errors import CheckpointError

_log = logging.getLogger("zeropipe")

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
        self.file_list = get_files(dir)
        self.layer_files = sorted(
            (f for f in self.file_list if LAYER.match(os.path.basename(f))), key=_layer_numbers
        )
        self.mp_rank_files = get_files_with_prefix(self.file_list, k.MODEL_FILE_PREFIX)
        self.zero_files = get_zero_files(dir)
        self.src_3d = get_model_3d_descriptor(dir)
        self.original_tp_degree = self.src_3d.tp_degree
        self.original_pp_degree = self.src_3d.pp_degree
        self.original_dp_degree = self.src_3d.dp_degree
        self.original_world_size = self.src_3d.world_size()
        self.tp_degree = tp_degree or self.original_tp_degree
        self.pp_degree = pp_degree or self.original_pp_degree
        self.dp_degree = dp_degree or self.original_dp_degree
        self.world_size = self.tp_degree * self.pp_degree * self.dp_degree
        target = model_3d_desc(self.pp_degree, self.tp_degree, self.dp_degree)
        fits, errors = self.src_3d.can_reshape(target)
        if not fits:
            raise CheckpointError(f"{dir}: " + "; ".join(errors))
        self.zero_checkpoint = ZeROCheckpoint(dir, self.src_3d) if self.zero_files else None
        if self.zero_checkpoint is not None:
            self.zero_checkpoint.reshape(target)
        self.old_2d_map = meg_2d_parallel_map(self.original_pp_degree, self.original_tp_degree)
        self.old_2d_map.simple_init()
        self.new_2d_map = reshape_meg_2d_parallel(
            self.original_pp_degree, self.original_tp_degree, self.pp_degree, self.tp_degree
        )
        self.layer_keys = sorted({_layer_numbers(f)[0] for f in self.layer_files})
        self.layer_count = len(self.layer_keys)
        self.global_state: dict[str, Any] = {}
        self.tp_to_embedding_map = self._other_layer(EMBEDDING_LAYER_INDEX)
        self.tp_to_final_norm_map = self._other_layer(final_layer_norm_idx)
        self.pp_to_transformer_map = self._stages()
        self.transformer_file_map = self._transformer_files()

    # What changes.

    def is_change_tp_degree(self) -> bool:
        return self.tp_degree != self.original_tp_degree

    def is_change_pp_degree(self) -> bool:
        return self.pp_degree != self.original_pp_degree

    def is_change_dp_degree(self) -> bool:
        return self.dp_degree != self.original_dp_degree

    # Maps, for reading and for the log.

    def show_2d_mapping(self) -> None:
        _log.info("reshaped 2d map ---- begin")
        for (pp, tp), ranks in sorted(self.new_2d_map.map.items()):
            _log.info("[%d, %d] -> %s", pp, tp, ranks)
        _log.info("reshaped 2d map ---- end")

    def show_tp_embedding_map(self) -> None:
        _show(self.tp_to_embedding_map, "tp_to_embedding_layers")

    def show_tp_final_norm_map(self) -> None:
        _show(self.tp_to_final_norm_map, "tp_to_final_norm_layers")

    def show_pp_transformer_map(self) -> None:
        _show(self.pp_to_transformer_map, "pp_to_transformer_layers")

    def show_transformer_file_map(self) -> None:
        _show(self.transformer_file_map, "rank_to_transformer_files")

    def get_embedding_layer_id(self) -> str:
        return self._layer_id(EMBEDDING_LAYER_INDEX)

    def get_final_norm_layer_id(self) -> str:
        return self._layer_id(self.final_layer_norm_idx)

    def get_embedding_files(self, tp_index: int) -> list[str]:
        return self._known(self.tp_to_embedding_map, tp_index, "tp_index")

    def get_final_norm_files(self, tp_index: int) -> list[str]:
        return self._known(self.tp_to_final_norm_map, tp_index, "tp_index")

    def get_pp_transformer_map(self, pp_index: int) -> list[str]:
        """Names of the layers of a pipeline stage."""
        return self._known(self.pp_to_transformer_map, pp_index, "pp_index")

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
        self.get_embedding_files(tp_index)
        return self._layer(self.layer_keys[EMBEDDING_LAYER_INDEX], tp_index)

    def get_final_norm_state(self, tp_index: int) -> dict[str, Any]:
        """The first file's: the norm is whole on every rank."""
        return self._read(self.get_final_norm_files(tp_index)[0])

    def get_transformer_state(self, tp_index: int, pp_index: int) -> list[dict[str, Any]]:
        """One state dict per layer of a (tensor, pipeline) rank."""
        names = self.get_pp_transformer_map(pp_index)
        return [self._layer(int(name.removeprefix(k.LAYER_FILE_PREFIX)), tp_index) for name in names]

    def get_2d_parallel_state(self, tp_index: int, pp_index: int) -> dict[str, Any]:
        """The model file of a (tensor, pipeline) rank: several merged into one, or one whose module is cut."""
        stages: dict[int, list[dict[str, Any]]] = {}
        for rank in self.new_2d_map.get_data(pp_index, tp_index):
            state = self._read(self.mp_rank_files[rank])
            state.pop(OURS, None)  # it describes one rank's file
            stages.setdefault(rank // self.original_tp_degree, []).append(state)
        united: dict[str, Any] | None = None
        for stage, ranks in stages.items():
            merged = ranks[0]
            for state in ranks[1:]:
                merged = merge_state(merged, state)
            if self.tp_degree > self.original_tp_degree:
                # A larger degree's part of what the model files of a stage hold of the module.
                first = stage * self.original_tp_degree
                files = self.mp_rank_files[first : first + self.original_tp_degree]
                modules = [self._read(file).get("module") for file in files]
                merged |= {"module": None if modules[0] is None else self._parts(modules, tp_index)}
            united = merged if united is None else unite(united, merged)
        assert united is not None
        return united

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
            self.global_state[key] = (
                self._read(self.mp_rank_files[0]).get(key) if self.mp_rank_files else None
            )
        return self.global_state[key]

    def _need_zero(self) -> ZeROCheckpoint:
        if self.zero_checkpoint is None:
            raise CheckpointError(f"{self.dir} has no ZeRO files", expected="*_optim_states.pt")
        return self.zero_checkpoint

    def _other_layer(self, index: int) -> dict[int, list[str]]:
        """New tensor rank -> files of one layer."""
        if not self.layer_keys:
            return {}
        files = self._files_of(self.layer_keys[index])
        return dict(enumerate(share(files, self.tp_degree)))

    def _stages(self) -> dict[int, list[str]]:
        names = [f"{k.LAYER_FILE_PREFIX}{number:02d}" for number in self._transformer_layers()]
        if not names:
            return {}
        if len(names) % self.pp_degree:
            raise CheckpointError(
                f"{len(names)} transformer layers cannot be shared out",
                expected="a divisor as pipeline degree",
                found=self.pp_degree,
            )
        return dict(enumerate(partition_data(names, self.pp_degree)))

    def _transformer_files(self) -> dict[tuple[int, int], list[list[str]]]:
        """(tensor rank, pipeline rank) -> per layer, the files to join."""
        found: dict[tuple[int, int], list[list[str]]] = {}
        layers = self._transformer_layers()
        per_stage = len(layers) // self.pp_degree
        for position, number in enumerate(layers):
            for tp, files in enumerate(share(self._files_of(number), self.tp_degree)):
                found.setdefault((tp, position // per_stage), []).append(files)
        return found

    def _transformer_layers(self) -> list[int]:
        last = self.final_layer_norm_idx % max(self.layer_count, 1)
        return [n for i, n in enumerate(self.layer_keys) if EMBEDDING_LAYER_INDEX < i < last]

    def _files_of(self, number: int) -> list[str]:
        return [f for f in self.layer_files if _layer_numbers(f)[0] == number]

    def _layer_id(self, index: int) -> str:
        return f"{k.LAYER_FILE_PREFIX}{self.layer_keys[index]:02d}"

    def _layer(self, number: int, tp_index: int) -> dict[str, Any]:
        """A new tensor rank's part of a layer."""
        return self._parts([self._read(file) for file in self._files_of(number)], tp_index, f"{number}.")

    def _parts(self, states: Sequence[Any], tp_index: int, prefix: str = "") -> dict[str, Any]:
        """``prefix``: what the names have before them in the module, which the rules go by."""
        return {
            key: slice_of(
                prefix + key, [state[key] for state in states], tp_index, self.tp_degree, self._rules
            )
            if isinstance(first, torch.Tensor)
            else first
            for key, first in states[0].items()
        }

    @cached_property
    def _rules(self) -> dict[str, Any] | None:
        """What the files say of how their tensors are cut."""
        return rules_in(self._read(self.mp_rank_files[0])) if self.mp_rank_files else None

    def _read(self, file: str) -> dict[str, Any]:
        return dict(load_torch(Path(file)))

    def _known(self, table: dict[int, list[str]], index: int, what: str) -> list[str]:
        if index not in table:
            raise CheckpointError(what, expected=f"below {len(table)}", found=index)
        return table[index]


def _layer_numbers(path: str) -> tuple[int, int]:
    match = LAYER.match(os.path.basename(path))
    assert match is not None
    return int(match[1]), int(match[2] or 0)


def _show(table: dict[Any, Any], title: str) -> None:
    _log.info("Dump mapping: %s", title)
    for key, value in table.items():
        _log.info("%s = %s", key, value)
