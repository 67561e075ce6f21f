"""How much memory model states take at stages 2 and 3, printed before anything is built.

Behind ``deepspeed.runtime.zero.stage_1_and_2`` and ``stage3``. The bytes are those of docs/zero.md and docs/offload.md:
bf16 or fp16 weights and Adam, without activations.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rich.console import Console

from zeropipe.runtime.zero.param import zero_param

GIB = 2**30
_STATE = 16  # bytes a parameter: weights 2, gradients 2, master 4, moments 8
_STATE_3 = 14  # the gathers of stage 3 read the master: there is no second copy in 16 bits


def _counts(model: torch.nn.Module) -> tuple[int, int]:
    """Elements of all parameters, whole, and of those of the largest single module."""

    def numel(param: torch.nn.Parameter) -> int:
        sharded = zero_param(param)
        return param.numel() if sharded is None else int(param.ds_numel)  # type: ignore[attr-defined]

    largest = max((sum(map(numel, m.parameters(recurse=False))) for m in model.modules()), default=0)
    return sum(map(numel, model.parameters())), largest


def estimate_zero2_model_states_mem_needs(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int]:
    """Bytes of (host memory of a node, memory of a GPU). ``additional_buffer_factor`` multiplies the host's."""
    ranks = num_gpus_per_node * num_nodes
    if not cpu_offload:
        return int(4 * total_params * num_gpus_per_node * additional_buffer_factor), int(
            (2 + (_STATE - 2) / ranks) * total_params
        )
    host = _STATE * total_params * num_gpus_per_node / ranks
    return int(host * additional_buffer_factor), 2 * total_params


def estimate_zero3_model_states_mem_needs(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    cpu_offload_params: bool = True,
    zero_init: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int, int]:
    """Bytes of (host memory of a node, memory of a GPU, the largest layer when it is gathered)."""
    ranks = num_gpus_per_node * num_nodes
    gathered = 4 * largest_layer_params
    host: float
    device: float
    share = num_gpus_per_node / ranks
    # Without zero.Init each process first builds the whole model, in fp32, on the host.
    building = 0 if zero_init else 4 * total_params * num_gpus_per_node
    if cpu_offload and cpu_offload_params:
        host, device = _STATE * total_params * share, gathered
    elif cpu_offload:
        host, device = (_STATE - 2) * total_params * share, gathered + 2 * total_params / ranks
    else:
        host, device = 0, gathered + _STATE_3 * total_params / ranks
    return int(max(host, building) * additional_buffer_factor), int(device), gathered


def _say(text: str) -> None:
    Console(soft_wrap=True, markup=False, highlight=False).print(text)


def _told(rows: Iterator[tuple[int, int, str]]) -> None:
    _say("  per CPU  |  per GPU |   Options")
    for host, device, options in rows:
        _say(f"{host / GIB:7.2f}GB | {device / GIB:6.2f}GB | {options}")


def _title(stage: int, what: str, num_gpus_per_node: int, num_nodes: int) -> None:
    _say(
        f"Estimated memory needed for params, optim states and gradients for a:\n"
        f"HW: Setup with {num_nodes} node{'s' * (num_nodes > 1)}, {num_gpus_per_node} "
        f"GPU{'s' * (num_gpus_per_node > 1)} per node.\nSW: Model with {what} at ZeRO stage {stage}."
    )


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print what stage 2 needs with and without offload, for a model of ``total_params`` parameters."""
    _title(2, f"{int(total_params / 1e6)}M total params", num_gpus_per_node, num_nodes)

    def rows() -> Iterator[tuple[int, int, str]]:
        for offload in (True, False):
            needs = estimate_zero2_model_states_mem_needs(
                total_params, num_gpus_per_node, num_nodes, offload, additional_buffer_factor
            )
            yield (*needs, f"offload_optimizer={'cpu' if offload else 'none'}")

    _told(rows())


def estimate_zero2_model_states_mem_needs_all_live(
    model: torch.nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """The same for ``model``."""
    estimate_zero2_model_states_mem_needs_all_cold(
        _counts(model)[0], num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print what stage 3 needs, for each place of the state and with and without ``zero.Init``."""
    what = f"{int(total_params / 1e6)}M total params, {int(largest_layer_params / 1e6)}M largest layer params"
    _title(3, what, num_gpus_per_node, num_nodes)

    def rows() -> Iterator[tuple[int, int, str]]:
        for state, params in (("cpu", "cpu"), ("cpu", "none"), ("none", "none")):
            for zero_init in (True, False):
                host, device, _ = estimate_zero3_model_states_mem_needs(
                    total_params, largest_layer_params, num_gpus_per_node, num_nodes, state == "cpu",
                    params == "cpu", zero_init, additional_buffer_factor,
                )  # fmt: skip
                options = f"offload_param={params:4}, offload_optimizer={state:4}, zero_init={int(zero_init)}"
                yield host, device, options

    _told(rows())


def estimate_zero3_model_states_mem_needs_all_live(
    model: torch.nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """The same for ``model``, whose parameters may be sharded already."""
    estimate_zero3_model_states_mem_needs_all_cold(
        *_counts(model), num_gpus_per_node, num_nodes, additional_buffer_factor
    )
