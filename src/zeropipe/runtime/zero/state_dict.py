"""``module.state_dict()`` and ``module.load_state_dict()`` of a model whose parameters are shards: whole values.

Both are hooks of the modules that own sharded parameters. Reading gathers, so every rank must call it; loading
cuts each rank's shard out of the whole value that it is given, so nothing is communicated. With ``keep_vars``
the parameters themselves come out, as always, and nothing is gathered: that is how checkpoints are made. So do
they where a part of the model is asked for its state dict and they are away, guarded against use: clients do that
on the one rank that writes, for the names alone (peft's ``modules_to_save``).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch

from zeropipe.comm.collectives import meet
from zeropipe.errors import CommunicationError, DesyncError, describe
from zeropipe.runtime.zero.param import shards_of
from zeropipe.runtime.zero.shards import GATHER, Shards
from zeropipe.runtime.zero.status import ZeroParamStatus

# Ranks may come to a state dict at different times, rank 0 after an evaluation.
PATIENCE = timedelta(minutes=5)


def install_state_dict(module: torch.nn.Module) -> None:
    """Make state dicts whole of what ``module`` owns (not of its children). May be repeated."""
    if not any(hook is _gather_whole for hook in module._state_dict_hooks.values()):
        module.register_state_dict_post_hook(_gather_whole)
        module.register_load_state_dict_pre_hook(_cut_shards)
        module.register_load_state_dict_post_hook(_hide_shapes)


def remove_state_dict(module: torch.nn.Module) -> None:
    """Undo ``install_state_dict``."""
    ours = (_gather_whole, _cut_shards, _hide_shapes)
    every: tuple[Any, ...] = (
        module._state_dict_hooks,
        module._load_state_dict_pre_hooks,
        module._load_state_dict_post_hooks,
    )
    for hooks in every:
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) in ours]:
            del hooks[key]


def _gather_whole(module: torch.nn.Module, state: Any, prefix: str, metadata: Any) -> None:
    """After ``module`` has put its own parameters into ``state``: replace them by whole values, new tensors."""
    wanted = {}
    for name, param, shards in _own(module):
        key = prefix + name
        if shards.status is not ZeroParamStatus.AVAILABLE and shards.name.endswith(f".{key}"):
            state[key] = param  # the call began at a part of the model
        elif state.get(key) is not param:
            wanted[key] = shards
    away = [shards for shards in wanted.values() if shards.status is not ZeroParamStatus.AVAILABLE]
    if away:  # keep_vars gives the parameters themselves
        _meet(away[0])
    for key, shards in wanted.items():
        if key in state:
            state[key] = _once(state, shards)


def _meet(shards: Shards) -> None:
    """Go on when every rank wants the state dict, which is not so where somebody calls it on rank 0 only."""
    try:
        meet(f"state_dict at {shards.name}", shards.group, channel=GATHER, patience=PATIENCE)
    except CommunicationError as error:
        raise DesyncError(
            describe(
                "state_dict of a model in shards gathers them, and other ranks did not answer",
                rank=shards.group.ranks[shards.group.rank],
                expected=f"a call on every one of the ranks {list(shards.group.ranks)}",
                found=f"none within {PATIENCE} on some",
                fix="call it on every rank and use the result on one; or engine.save_16bit_model, save_checkpoint",
            )
        ) from error


def _once(state: Any, shards: Shards) -> torch.Tensor:
    """The whole value; the same tensor for every name that the parameter has in one state dict."""
    if shards.shown is not None:
        asked, value = shards.shown[0](), shards.shown[1]()
        if asked is state and value is not None:
            return value
    whole = shards.whole()
    with suppress(TypeError):  # a plain dict cannot be told apart from a later one
        shards.shown = (weakref.ref(state), weakref.ref(whole))
    return whole


def _cut_shards(
    module: torch.nn.Module,
    state: Any,
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Before torch loads ``module``'s own parameters: let torch see their whole shapes, so that its checks and
    messages are the usual ones; what it then copies is cut into shards (``loading``)."""
    metadata["assign_to_params_buffers"] = False  # a shard cannot be replaced by the tensor that is loaded
    for name, _, shards in _own(module):
        value = state.get(prefix + name)
        if not isinstance(value, torch.Tensor):
            continue
        if shards.status is not ZeroParamStatus.NOT_AVAILABLE:
            shards.finish_gather()
            if value.shape == shards.shape or (value.shape == (1,) and shards.shape == ()):
                shards.write(value)  # torch's own copy then changes nothing
        else:
            shards.begin_loading()


def _hide_shapes(module: torch.nn.Module, incompatible: Any) -> None:
    for _, _, shards in _own(module):
        if shards.loading:  # a shape that did not fit, or a load that raised
            shards.end_loading()


def _own(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter, Shards]]:
    for name, param in module._parameters.items():
        shards = None if param is None else shards_of(param)
        if param is not None and shards is not None:
            yield name, param, shards
