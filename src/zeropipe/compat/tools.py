"""Small functions that scripts import from DeepSpeed's ``runtime.utils``, ``utils`` and ``utils.logging``.

Model parallelism is the caller's: where an ``mpu`` is given, its groups are asked.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, ParamSpec, TypeVar

import torch
from rich.console import Console

from zeropipe.accelerator import get_accelerator
from zeropipe.comm.collectives import all_gather, all_reduce
from zeropipe.comm.group import Group, from_process_group, world
from zeropipe.given import Mpu, Namespace, ProcessGroup
from zeropipe.layout.balance import cut_balanced, cut_evenly
from zeropipe.utils.logging import logger

P = ParamSpec("P")
R = TypeVar("R")

# deepspeed.runtime.utils

inf: Final = math.inf


def _joined(group: ProcessGroup) -> Group:
    """The ranks of a process group; all of them for None."""
    return world() if group is None else from_process_group(group)


def _gather(mine: torch.Tensor, group: Group) -> tuple[torch.Tensor, ...]:
    """Every rank's ``mine``, 1-D and of one length."""
    whole = mine.new_empty(group.size * mine.numel())
    all_gather(whole, mine.contiguous(), group, label="compat")
    return whole.tensor_split(group.size)


def set_random_seed(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, of every device."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def partition_uniform(num_items: int, num_parts: int) -> list[int]:
    """Bounds of ``num_parts`` runs of ``num_items``; more parts than items leaves the last ones empty."""
    if num_items < num_parts:
        return [min(part, num_items) for part in range(num_parts + 1)]
    return list(cut_evenly(num_items, num_parts))


def partition_balanced(weights: Sequence[float], num_parts: int) -> list[int]:
    """Bounds of ``num_parts`` runs of ``weights`` whose heaviest is as light as it can be."""
    if len(weights) < num_parts:
        return partition_uniform(len(weights), num_parts)
    # Cuts are made of whole numbers; fractions keep six digits.
    scale = 1 if all(float(weight).is_integer() for weight in weights) else 10**6 / max(weights)
    return list(cut_balanced([round(weight * scale) for weight in weights], num_parts))


def is_model_parallel_parameter(p: torch.Tensor) -> bool:
    """Whether a tensor-parallel library marked ``p`` as cut among its ranks."""
    return bool(getattr(p, "model_parallel", False) or getattr(p, "tensor_model_parallel", False))


def bwc_tensor_model_parallel_rank(mpu: Mpu = None) -> int:
    """This rank's place among the tensor-parallel ones, by whichever name ``mpu`` has for it; 0 without one."""
    for name in ("get_tensor_model_parallel_rank", "get_slice_parallel_rank", "get_model_parallel_rank"):
        if hasattr(mpu, name):
            return int(getattr(mpu, name)())
    return 0


def get_global_norm(norm_list: Iterable[float]) -> float:
    """The 2-norm of norms."""
    return math.sqrt(sum(float(norm) ** 2 for norm in norm_list))


def get_global_norm_of_tensors(
    input_tensors: Iterable[torch.Tensor],
    norm_type: float = 2.0,
    mpu: Mpu = None,
    use_graph: bool = False,
    moe_ep_group: ProcessGroup = None,
) -> torch.Tensor:
    """The norm of all tensors together, over the model-parallel ranks of ``mpu`` too; a scalar, fp32."""
    tensors = [tensor.detach().float() for tensor in input_tensors]
    device = tensors[0].device if tensors else torch.device("cpu")
    each = torch.stack(
        [torch.linalg.vector_norm(t, norm_type) for t in tensors] or [torch.zeros((), device=device)]
    )
    if math.isinf(norm_type):
        total = each.max()
        if mpu is not None:
            all_reduce(total, _joined(mpu.get_model_parallel_group()), op="max")
        return total
    total = each.pow(norm_type).sum()
    if mpu is not None:
        all_reduce(total, _joined(mpu.get_model_parallel_group()))
    return total.pow(1.0 / norm_type)


def clip_tensors_by_global_norm(
    input_tensors: Iterable[torch.Tensor],
    max_norm: float = 1.0,
    global_norm: float | torch.Tensor | None = None,
    mpu: Mpu = None,
    eps: float = 1e-6,
    use_graph: bool = False,
) -> float | torch.Tensor:
    """Scale the tensors in place so that their norm together is at most ``max_norm``; returns the norm before."""
    tensors = list(input_tensors)
    norm = get_global_norm_of_tensors(tensors, mpu=mpu) if global_norm is None else global_norm
    factor = max_norm / (float(norm) + eps)
    if factor < 1:
        for tensor in tensors:
            tensor.detach().mul_(factor)
    return norm


def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor], max_norm: float, norm_type: float = 2, mpu: Mpu = None
) -> torch.Tensor:
    """As torch's; with ``mpu`` the norm is over the model-parallel ranks, parameters that all hold counted once."""
    given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    if mpu is None:
        return torch.nn.utils.clip_grad_norm_(given, max_norm, norm_type)
    first = bwc_tensor_model_parallel_rank(mpu) == 0
    counted = [p.grad for p in given if p.grad is not None and (first or is_model_parallel_parameter(p))]
    norm = get_global_norm_of_tensors(counted, norm_type, mpu)
    torch.nn.utils.clip_grads_with_norm_(given, max_norm, norm)
    return norm


def align_dense_tensors(tensor_list: Sequence[torch.Tensor], alignment: int) -> list[torch.Tensor]:
    """The tensors, and after them zeros that make the sum of elements a multiple of ``alignment``."""
    missing = -sum(tensor.numel() for tensor in tensor_list) % alignment
    if not missing:
        return list(tensor_list)
    like = tensor_list[0]
    return [*tensor_list, torch.zeros(missing, dtype=like.dtype, device=like.device)]


def all_gather_dp_groups(
    groups_flat: Sequence[torch.Tensor],
    partitioned_param_groups: Sequence[Sequence[torch.Tensor]],
    dp_process_group: Sequence[Any],
    start_alignment_factor: int = 2,
    allgather_bucket_size: int = 0,
) -> None:
    """Fill each rank's partition of each flat tensor with that rank's values."""
    for parts, group in zip(partitioned_param_groups, dp_process_group, strict=True):
        ranks = _joined(group)
        for part, found in zip(parts, _gather(parts[ranks.rank].reshape(-1), ranks), strict=True):
            part.copy_(found.view_as(part))


class PartitionedTensor:
    """A tensor of which each rank of ``group`` holds a run of elements, the last one with padding.

    ``to_meta()`` is an int64 vector of 4 + dims + N + 1 numbers from which, with ``local_data``, ``from_meta`` makes
    it again on another rank of a group of that size.
    """

    def __init__(
        self, tensor: torch.Tensor, group: ProcessGroup, partition_meta: torch.Tensor | None = None
    ) -> None:
        self.group = group
        ranks = _joined(group)
        self.num_parts, self.rank = ranks.size, ranks.rank
        self.orig_size, self.orig_device = list(tensor.shape), tensor.device
        self.partition = partition_uniform(tensor.numel(), self.num_parts)
        start, end = self.partition[self.rank : self.rank + 2]
        self.local_data = tensor.detach().reshape(-1)[start:end].clone()

    @classmethod
    def from_meta(
        cls,
        meta: torch.Tensor,
        local_part: torch.Tensor,
        group: ProcessGroup,
        device: torch.device | str | None = None,
    ) -> PartitionedTensor:
        numbers = meta.tolist()
        made = cls.__new__(cls)
        made.group = group
        dims = numbers[0]
        made.orig_size, made.orig_device = numbers[1 : 1 + dims], torch.device(device or local_part.device)
        made.num_parts = numbers[1 + dims]
        made.partition = numbers[3 + dims :]
        made.local_data = local_part.detach()
        made.rank = _joined(group).rank
        return made

    def to_meta(self) -> torch.Tensor:
        numbers = [len(self.orig_size), *self.orig_size, self.num_parts, self.rank, *self.partition]
        return torch.tensor(numbers, dtype=torch.long, device=self.orig_device)

    def data(self) -> torch.Tensor:
        return self.local_data

    def local_size(self) -> torch.Size:
        return self.local_data.size()

    def full_size(self) -> list[int]:
        return self.orig_size

    def full(self, device: torch.device | str | None = None) -> torch.Tensor:
        """The whole tensor on every rank of the group."""
        device = device or self.orig_device
        most = max(
            (end - start for start, end in zip(self.partition, self.partition[1:], strict=False)), default=0
        )
        mine = torch.zeros(most, dtype=self.local_data.dtype, device=device)
        mine[: self.local_data.numel()] = self.local_data
        every = _gather(mine, _joined(self.group))
        bounds = zip(self.partition, self.partition[1:], strict=False)
        parts = [part[: end - start] for part, (start, end) in zip(every, bounds, strict=True)]
        return torch.cat(parts).view(self.orig_size)


def empty_cache() -> None:
    """Give the allocator's unused memory back to the device, after what only Python's collector frees."""
    gc.collect()
    get_accelerator().empty_cache()


def noop_decorator(function: Callable[P, R]) -> Callable[P, R]:
    return function


def get_ma_status() -> int:
    """Bytes allocated on the device, on rank 0; 0 elsewhere."""
    return int(get_accelerator().memory_allocated()) if world().rank == 0 else 0


def ensure_directory_exists(filename: str) -> None:
    """Make the folder that ``filename`` lies in."""
    from pathlib import Path

    Path(filename).parent.mkdir(parents=True, exist_ok=True)


# deepspeed.runtime.data_pipeline.data_routing.helper


def remove_random_ltd_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with the names that the layers had before DeepSpeed wrapped them to drop tokens."""
    return {name.replace(".random_ltd_layer", ""): value for name, value in state_dict.items()}


def save_without_random_ltd(model: torch.nn.Module) -> dict[str, Any]:
    """The model's state dict, or that of the model in an engine."""
    return remove_random_ltd_state_dict(getattr(model, "module", model).state_dict())


# deepspeed.utils, deepspeed.utils.logging, deepspeed.utils.nvtx


def instrument_w_nvtx(func: Callable[P, R]) -> Callable[P, R]:
    """Name the calls of ``func`` in a profile, as a range of torch's profiler (and of NVTX under its emitter)."""

    @functools.wraps(func)
    def named(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.profiler.record_function(func.__qualname__):
            return func(*args, **kwargs)

    return named


def set_log_level_from_string(log_level_str: str) -> None:
    """``debug``, ``info``, ``warning``, ``error`` or ``critical``, for zeropipe's logger."""
    logger.setLevel(log_level_str.upper())


def should_log_le(max_log_level_str: str) -> bool:
    """Whether zeropipe's logger shows messages of this level."""
    return logger.getEffectiveLevel() <= logging.getLevelNamesMapping()[max_log_level_str.upper()]


def print_dist(message: str, ranks: Sequence[int] | None = None) -> None:
    """Print ``message`` on the ranks that ``ranks`` names; None, empty or -1 among them: on all."""
    rank = world().rank
    if not ranks or -1 in ranks or rank in ranks:
        Console(soft_wrap=True, markup=False, highlight=False).print(f"[Rank {rank}] {message}")


def print_json_dist(
    message: Mapping[str, Any], ranks: Sequence[int] | None = None, path: str | None = None
) -> None:
    """Write ``message`` and the rank, as JSON, to the file ``path``, on the ranks that ``ranks`` names."""
    rank = world().rank
    if path is not None and (not ranks or -1 in ranks or rank in ranks):
        with open(path, "w") as out:
            json.dump({**message, "rank": rank}, out)


def print_configuration(args: Namespace, name: str) -> None:
    """Log the attributes or items of ``args``, sorted, under the title ``name``."""
    items = args if isinstance(args, Mapping) else vars(args)
    logger.info("%s:", name)
    for key in sorted(items):
        logger.info("  %s %s %s", key, "." * (29 - len(key)), items[key])
