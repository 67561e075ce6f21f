"""Words of ``deepspeed.moe`` for scripts that import them and have no expert layer: nothing is an expert's.

Behind ``deepspeed.moe.utils``. Building DeepSpeed's expert layer is an error that says what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from zeropipe.errors import UsageError
from zeropipe.given import ParametersLike

ParamGroups = dict[str, Any] | Sequence[dict[str, Any]]


def is_moe_param(param: torch.Tensor) -> bool:
    """Whether the gradient of ``param`` stays among the ranks that hold its expert: of none here.

    Raises UsageError for one that somebody marked so (``allreduce = False``): it would be averaged all the same.
    """
    if getattr(param, "allreduce", True):
        return False
    raise UsageError(
        f"a parameter of shape {tuple(param.shape)} is marked as an expert's (allreduce = False)",
        expected="experts on every rank, whose gradients are averaged like all others",
        fix="remove the mark; write the experts as modules, and at stage 3 mark them with set_z3_leaf_modules",
    )


def is_moe_param_group(param_group: dict[str, Any]) -> bool:
    return bool(param_group.get("moe", False))


def has_moe_layers(m: torch.nn.Module) -> tuple[bool, int]:
    """(whether the module has DeepSpeed's expert layers, how many experts each has): (False, 0)."""
    return False, 0


def split_params_into_shared_and_expert_params(
    params: Sequence[torch.nn.Parameter],
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """(those that all ranks average, those of experts)."""
    shared = [param for param in params if not is_moe_param(param)]
    return shared, []


def split_params_grads_into_shared_and_expert_params(
    group: Sequence[torch.nn.Parameter],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same, of the gradients that are there."""
    shared, _ = split_params_into_shared_and_expert_params(group)
    return [param.grad for param in shared if param.grad is not None], []


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: ParamGroups, max_group_size: float = 178956971
) -> list[dict[str, Any]]:
    """The param groups, as a list of the very same dicts: there are no experts to take out of them."""
    groups = [param_groups] if isinstance(param_groups, dict) else list(param_groups)
    for group in groups:
        for param in group["params"]:
            is_moe_param(param)
    return groups


def configure_moe_param_groups(model_parameters: ParametersLike) -> list[dict[str, Any]]:
    """Param groups of parameters, or of param groups."""
    given = list(model_parameters)
    if given and not isinstance(given[0], dict):
        given = [{"params": given, "name": "dense-params"}]
    return split_params_into_different_moe_groups_for_optimizer(given)
