"""``module.state_dict()`` and ``module.load_state_dict()`` of a model whose parameters are shards: whole values.

Both are hooks of the modules that own sharded parameters:

    state_dict        before   [1] where a class has code of its own for this, what it uses is gathered (``Fetching``)
                      after    [2] shards become whole values, new tensors
    load_state_dict   before   [3] parameters show their whole shape; what torch then copies in is cut
                      after    [4] they show nothing again

Reading gathers, so every rank must call it; loading cuts each rank's shard out of the whole value that it is given, so
nothing is communicated. With ``keep_vars`` the parameters themselves come out, as always, and nothing is gathered: that
is how checkpoints are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch

from zeropipe.comm.agreement import leave_all, meet
from zeropipe.errors import CommunicationError, DesyncError
from zeropipe.runtime.zero.gather.edits import take_moved
from zeropipe.runtime.zero.gather.parameter import AwayValue
from zeropipe.runtime.zero.gather.shards import Builder, Hold, Shards, shards_in, shards_of
from zeropipe.runtime.zero.param import GATHER, State

# Ranks may come to a state dict at different times, rank 0 after an evaluation.
PATIENCE = timedelta(minutes=5)


def install_state_dict(module: torch.nn.Module) -> None:
    """Make state dicts whole of what ``module`` owns (not of its children). May be repeated."""
    hooks: Any = module._state_dict_hooks
    if not any(map(is_ours, hooks.values())):
        module.register_state_dict_pre_hook(_let_use)
        whole = module.register_state_dict_post_hook(_gather_whole)
        # Before the user's own, which are to see, and may change, the whole values.
        hooks.move_to_end(whole.id, last=False)
        module.register_load_state_dict_pre_hook(_cut_shards)
        module.register_load_state_dict_post_hook(_hide_shapes)


def is_ours(hook: object) -> bool:
    """Whether a state dict hook is one of those that ``install_state_dict`` puts on a module."""
    return getattr(hook, "hook", hook) in (_let_use, _gather_whole, _cut_shards, _hide_shapes)


def remove_state_dict(module: torch.nn.Module) -> None:
    """Undo ``install_state_dict``."""
    saving: tuple[dict[int, Any], ...] = module._state_dict_pre_hooks, module._state_dict_hooks
    loading: tuple[dict[int, Any], ...] = (
        module._load_state_dict_pre_hooks,
        module._load_state_dict_post_hooks,
    )
    for hooks in saving + loading:
        for key in [key for key, hook in hooks.items() if is_ours(hook)]:
            del hooks[key]


def _let_use(module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
    """[1] Before ``module`` puts its own state into a state dict."""
    saving = ("_save_to_state_dict", "get_extra_state")
    if all(getattr(type(module), name) is getattr(torch.nn.Module, name) for name in saving):
        return
    own = [(name, shards) for name, _, shards in _own(module)]
    if not own or any(shards.building or _at_a_part(shards, prefix + name) for name, shards in own):
        return
    _meet(shards for _, shards in own)
    # [2] leaves it; where what lies between raises, that of the module's next state dict does.
    Fetching(module, recurse=False).__enter__()


def _at_a_part(shards: Shards, key: str) -> bool:
    """Whether the call of ``state_dict`` began at a part of the model, by the key that it gives the parameter."""
    # Clients do that on the one rank that writes, for the names alone (peft's ``modules_to_save``): so parameters that
    # are away come out as they are, guarded against use.
    return not shards.gathered and shards.name.endswith(f".{key}")


def _gather_whole(module: torch.nn.Module, state: Any, prefix: str, metadata: Any) -> None:
    """[2] After it has, and those below it. What the module itself has made of its parameters stays."""
    wanted = {}
    using: Fetching | None = None
    for name, param, shards in _own(module):
        key = prefix + name
        if isinstance(shards.builder, Fetching) and shards.builder.of is module:
            using = shards.builder
        value = state.get(key)
        if _at_a_part(shards, key) and isinstance(value, AwayValue):
            state[key] = param
        elif isinstance(value, AwayValue) or (value is not param and _shows(shards, value)):
            wanted[key] = shards  # with ``keep_vars`` the value is the parameter itself
    _meet(wanted.values())
    # One at a time: what all of them take is the state dict's own memory, which the caller has asked for.
    for key, shards in wanted.items():
        state[key] = shards.whole(asked=state)
    if using is not None:
        using.keep_copies(state)
        using.__exit__(None, None, None)


def _meet(wanted: Iterable[Shards]) -> None:
    """Before those that are away are gathered: go on when every rank wants the state dict, which is not so where
    somebody calls it on rank 0 only."""
    shards = next((shards for shards in wanted if not shards.gathered), None)
    if shards is None:
        return
    try:
        meet(f"state_dict at {shards.name}", shards.group, channel=GATHER, patience=PATIENCE)
    except CommunicationError as error:
        raise DesyncError(
            "state_dict of a model in shards gathers them, and other ranks did not answer",
            rank=shards.group.ranks[shards.group.rank],
            expected=f"a call on every one of the ranks {list(shards.group.ranks)}",
            found=f"none within {PATIENCE} on some",
            fix="call it on every rank and use the result on one; or engine.save_16bit_model, save_checkpoint",
        ) from error


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
    """[3] Before torch loads ``module``'s own parameters."""
    metadata["assign_to_params_buffers"] = False  # a shard cannot be replaced by the tensor that is loaded
    for name, _, shards in _own(module):
        # Whole: torch copies into the value itself, of which the shards would not learn. Away: torch sees the whole
        # shape, so that its checks and messages are the usual ones, and the copy comes to ``Shards.write``.
        if shards.state in (State.WHOLE, State.INFLIGHT):
            value = state.get(prefix + name)
            if not isinstance(value, torch.Tensor):
                continue
            shards.finish_gather()
            if value.shape == shards.shape or (value.shape == (1,) and shards.shape == ()):
                shards.write(value)  # torch's own copy then changes nothing
        else:
            shards.show_shape(
                State.LOADING
            )  # whatever ``state`` holds now: a hook that comes later may change it


def _end_loading(shards: Shards) -> None:
    if shards.state is State.LOADING:
        shards.release_if_idle()


def _hide_shapes(module: torch.nn.Module, incompatible: Any) -> None:
    """[4] After it has, and those below it."""
    for _, _, shards in _own(module):
        _end_loading(shards)  # a shape that did not fit, or a load that raised


def _own(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter, Shards]]:
    for name, param in module._parameters.items():
        shards = None if param is None else shards_of(param)
        if param is not None and shards is not None:
            yield name, param, shards


@contextmanager
def built_by(builder: Builder, every: Iterable[Shards]) -> Iterator[None]:
    """Let ``builder`` fetch all of them, instead of who does outside."""
    before = [(shards, shards.builder) for shards in every]
    for shards, _ in before:
        shards.builder = builder
    try:
        yield
    finally:
        for shards, builder_before in before:
            shards.builder = builder_before


class Fetching:
    """While entered, any use of a sharded parameter of ``module`` gathers it, until ``let_go``; what was written to it
    is cut into shards again. Every rank must do the same; where one raises, the others are told.
    """

    def __init__(self, module: torch.nn.Module, recurse: bool = True) -> None:
        self.of = module
        self._recurse = recurse
        self._shards = shards_in(module, recurse)
        self._instead = ExitStack()  # of whoever fetches the parameters outside
        self._held: list[Hold] = []
        self.active = False

    def __enter__(self) -> Fetching:
        self._instead.enter_context(built_by(self, self._shards))
        self.active = True
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.active = False
        # [1] Uses are again the affair of whoever fetches outside.
        self._instead.close()
        for shards in self._shards:
            _end_loading(shards)
        self.let_go(keep=error is None)
        # [2] Those that were whole before, persistent or held by somebody else, were fetched by nobody.
        if error is None:
            for shards in self._shards:
                _take_writes(shards)
        # [3] Last, since until here a rank may raise.
        self._say_how_it_ended(error)

    def _say_how_it_ended(self, error: BaseException | None) -> None:
        """One word from every rank, so that one which raised is heard where others wait for it, and by nobody later."""
        sharing = dict.fromkeys(shards.group for shards in self._shards)
        circles = sharing | dict.fromkeys(shards.everyone for shards in self._shards)
        if error is None:
            for circle in circles if self._recurse else ():
                meet(f"the end of the state of {type(self.of).__name__}", circle, channel=GATHER)
            return
        met = sharing if isinstance(error, DesyncError) else circles  # words are met in gathers
        said = f"state dict: {type(error).__name__} raised"
        for heard in leave_all(said, error, circles, met, channel=GATHER):
            with suppress(DesyncError, CommunicationError):
                heard()

    def fetch(self, shards: Shards) -> None:
        """A use of a parameter that is away."""
        _end_loading(shards)
        shards.gather()
        self._held.append(shards.hold())

    def keep_copies(self, state: MutableMapping[str, Any]) -> None:
        """Replace tensors in ``state`` that lie in gathered values by copies, before those are freed."""
        # By their memory: a class's own code may have put in a view, a part, or the value under another name.
        homes = {hold.shards.full.untyped_storage().data_ptr(): hold.shards for hold in self._held}
        for key, value in state.items() if homes else ():
            if not isinstance(value, torch.Tensor) or shards_of(value) is not None:
                continue
            shards = homes.get(value.untyped_storage().data_ptr())
            if shards is None:
                continue
            state[key] = shards.param if _shows(shards, value) else value.clone()

    def let_go(self, keep: bool = True) -> None:
        """Free what was gathered since the last time; ``keep`` what was written to it."""
        held, self._held = self._held, []
        for hold in held:
            if keep:
                _take_writes(hold.shards)
            hold.release()


def _take_writes(shards: Shards) -> None:
    """Cut a gathered value that was written to, or replaced through ``.data``, into shards again."""
    if shards.gathered:
        take_moved(shards)
        if shards.differs():
            shards.write_back()


def _shows(shards: Shards, value: Any) -> bool:
    """Whether ``value`` is the gathered value itself: all of it, in its memory."""
    return (
        isinstance(value, torch.Tensor)
        and shards.gathered
        and value.shape == shards.shape
        and value.data_ptr() == shards.full.data_ptr()
        and value.is_contiguous()
    )
