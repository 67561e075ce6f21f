"""Which source ranks make up each target rank when pipeline, tensor and data degrees change together.

Source ranks are numbered tensor-first, then pipeline, then data, as DeepSpeed's optimizer files are.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zeropipe.checkpoint.constants import (
    CHECKPOINT_PARALLEL_DIMS,
    CHECKPOINT_PP_DEGREE,
    CHECKPOINT_TP_DEGREE,
    LAYER_FILE_PREFIX,
    MODEL_FILE_PREFIX,
)
from zeropipe.checkpoint.reshape_meg_2d import meg_2d_parallel_map, reshape_2d_map
from zeropipe.checkpoint.reshape_utils import (
    basic_folder_validation,
    get_files,
    get_files_with_prefix,
    get_zero_files,
    share,
)
from zeropipe.checkpoint.save.files import load_torch
from zeropipe.errors import CheckpointError

PP_DIM, TP_DIM, DP_DIM = "PP", "TP", "DP"


@dataclass(frozen=True, eq=True)
class model_3d_desc:
    """The degrees of a checkpoint or a run."""

    pp_degree: int = 1
    tp_degree: int = 1
    dp_degree: int = 1

    def reshape(self, target_3d_desc: model_3d_desc, verbose: bool = False) -> list[meg_2d_parallel_map]:
        """One 2-D map per target data-parallel rank, with the source ranks that it takes its state from.

        Up as well as down: where the target has more ranks, several of them list the same source rank.
        Raises CheckpointError where ``can_reshape`` says no.
        """
        fits, errors = self.can_reshape(target_3d_desc)
        if not fits:
            raise CheckpointError("; ".join(errors))
        # [1] Each model-parallel rank brings its data-parallel peers along, [2] the two degrees are changed as if there
        # were no others, [3] what came together in a cell is dealt out to the new peers.
        source = meg_2d_parallel_map(self.pp_degree, self.tp_degree)
        source.simple_init()
        flat = flatten_dp_dimension(source, self.pp_degree * self.tp_degree, self.dp_degree)
        shaped = reshape_2d_map(flat, target_3d_desc.pp_degree, target_3d_desc.tp_degree, verbose)
        return unflatten_dp_dimension(shaped, target_3d_desc.dp_degree)

    def get_desc(self) -> str:
        return f"{PP_DIM},{TP_DIM},{DP_DIM} = ({self.pp_degree}, {self.tp_degree}, {self.dp_degree})"

    def world_size(self) -> int:
        return self.pp_degree * self.tp_degree * self.dp_degree

    def is_valid(self, pp_index: int, tp_index: int, dp_index: int) -> tuple[bool, list[str]]:
        """Whether the indices lie inside, and what is wrong with those that do not."""
        checks = (
            (pp_index, self.pp_degree, PP_DIM),
            (tp_index, self.tp_degree, TP_DIM),
            (dp_index, self.dp_degree, DP_DIM),
        )
        errors = [
            f"{name} indexing error: index {index} >= degree {degree}"
            for index, degree, name in checks
            if index >= degree
        ]
        return not errors, errors

    def can_reshape(self, target_3d_desc: model_3d_desc) -> tuple[bool, list[str]]:
        """Whether each degree divides the other one's, either way; why not otherwise."""
        pairs = (
            (self.pp_degree, target_3d_desc.pp_degree, PP_DIM),
            (self.tp_degree, target_3d_desc.tp_degree, TP_DIM),
        )
        errors = [
            f"Uneven reshape not supported - {name}: {old} ---> {new}"
            for old, new, name in pairs
            if new < 1 or (old % new and new % old)
        ]
        if target_3d_desc.dp_degree < 1:
            errors.append(f"{DP_DIM} degree must be at least 1, found {target_3d_desc.dp_degree}")
        return not errors, errors


def get_model_3d_descriptor(dir: str) -> model_3d_desc:
    """The degrees of the checkpoint in ``dir``, read off its file names. Raises CheckpointError."""
    basic_folder_validation(dir)
    files = get_files(dir)
    zero_files = get_zero_files(dir)
    models = [f for f in files if f.endswith("model_states.pt")]
    layers = [os.path.basename(f) for f in get_files_with_prefix(models, LAYER_FILE_PREFIX)]
    mp_files = get_files_with_prefix(models, MODEL_FILE_PREFIX)
    if not mp_files and not zero_files:
        raise CheckpointError(f"{dir} holds no checkpoint files", expected="mp_rank_XX_model_states.pt")
    # A layer has a file of every tensor-parallel rank, whatever the model files say.
    if layers:
        tp = len(get_files_with_prefix(models, f"{layers[0].split('-')[0]}-model_"))
        pp = max(1, len(mp_files) // tp)
    else:  # as the first model file states them; else all ranks are tensor-parallel
        dims: Any = load_torch(Path(mp_files[0])).get(CHECKPOINT_PARALLEL_DIMS) or {} if mp_files else {}
        pp = int(dims.get(CHECKPOINT_PP_DEGREE, 1))
        tp = int(dims.get(CHECKPOINT_TP_DEGREE, max(1, len(mp_files) // pp)))
    # Every rank has an optimizer file; stage 0 has none, and needs no peers to be read.
    return model_3d_desc(pp, tp, max(1, len(zero_files) // (pp * tp)))


def flatten_dp_dimension(
    meg_2d_map: meg_2d_parallel_map, src_2d_size: int, dp_degree: int
) -> meg_2d_parallel_map:
    """Each cell's rank and its data-parallel peers."""
    # Files are numbered by data-parallel rank first: a peer's is one grid of model-parallel ranks further on.
    flat = meg_2d_parallel_map(meg_2d_map.pp_degree, meg_2d_map.tp_degree)
    for pp in range(flat.pp_degree):
        for tp in range(flat.tp_degree):
            ranks = meg_2d_map.get_data(pp, tp)
            flat.add_data(pp, tp, [r + dp * src_2d_size for r in ranks for dp in range(dp_degree)])
    return flat


def unflatten_dp_dimension(meg_2d_map: meg_2d_parallel_map, dp_degree: int) -> list[meg_2d_parallel_map]:
    """Each cell's ranks dealt out to ``dp_degree`` maps, in runs; ranks are repeated where there are too few."""
    maps = [meg_2d_parallel_map(meg_2d_map.pp_degree, meg_2d_map.tp_degree) for _ in range(dp_degree)]
    for pp in range(meg_2d_map.pp_degree):
        for tp in range(meg_2d_map.tp_degree):
            for target, part in zip(maps, share(meg_2d_map.get_data(pp, tp), dp_degree), strict=True):
                target.add_data(pp, tp, part)
    return maps
