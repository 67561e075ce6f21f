"""zero.Init: inside it a model is built shard by shard, so that no rank ever holds more than one module whole.

    with zero.Init(config_dict_or_path=config):
        model = Model()

When a module's outermost constructor returns, the module's parameters are cut and freed. Whatever the outer
constructors then do with them (their own initialization, tying, ``apply``) gathers them again for as long as the
constructor runs, and what was written is cut anew (``build.py``); so the weights are those of a plain construction.
Later ``module.apply(fn)`` of such a model lets ``fn`` find and edit whole parameters in the same way.

``ModulePatch`` is the only code that changes ``torch.nn.Module``, and it changes it back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any

import torch

from zeropipe.comm.group import Group, from_process_group, group_of, init_distributed, with_words, world
from zeropipe.comm.leases import LEASES
from zeropipe.config.parse import Source, parse_config
from zeropipe.config.schema import Config
from zeropipe.config.schema_zero import ZeroOptimization
from zeropipe.errors import ConfigError
from zeropipe.given import Anything, Mpu, ProcessGroup
from zeropipe.names import lazy
from zeropipe.runtime.zero.gather.build import Build, Site
from zeropipe.runtime.zero.gather.shards import Shards, shards_in
from zeropipe.runtime.zero.gather.state_dict import built_by
from zeropipe.runtime.zero.gather.weights import load_built
from zeropipe.runtime.zero.gather.whole import GatheredParameters
from zeropipe.runtime.zero.hold.offload import arena_of
from zeropipe.runtime.zero.param import CHANNELS
from zeropipe.runtime.zero.replication import shard_group
from zeropipe.tensor.weight_files import Weights


class Init:
    """A context in which modules are built as shards. Collective: every rank builds the same model.

    With the same seed the weights are, bit for bit, those that plain construction gives rank 0; in 16 bits, those
    rounded when the context ends. Buffers are those of plain construction. Contexts nest and may be entered again.

    Args:
        module: an existing module: its parameters are sharded at once, those on the meta device after
            ``to_empty`` and ``reset_parameters``. The context need not be entered then.
        data_parallel_group: the ranks to divide by (a process group); default all. Must be the engine's.
        remote_device: where shards live: ``cpu``, or ``nvme`` for files in the config's ``offload_param.nvme_path``;
            default the config's ``offload_param.device``.
        config_dict_or_path: the engine's config, "auto" values included. Its fp16 or bf16 section gives the dtype
            of parameters; a stage below 3 makes the context do nothing.
        config: another name for ``config_dict_or_path``.
        enabled: False makes it do nothing.
        dtype: the dtype of parameters after the context, but for those that ``tensor.model`` keeps; default the
            config's, else the one that each is made with.
        mpu: an object with ``get_data_parallel_group()``.
        zero_param_parallel_group, sequence_data_parallel_group: other names for ``data_parallel_group``.
        weights: a folder, a file, an index file or files (safetensors, or what ``torch.save`` wrote of a state dict),
            whose keys are names of the one model that is built: when the context ends each rank reads its own elements
            of each tensor and no others. Names without weights keep what their constructors gave; a warning names
            them, and keys that are unused. A ``module`` on meta needs no ``reset_parameters``. In 16 bits parameters
            are rounded with their module, so those beside which fp32 is to stay are to be made in 16 bits.

    The rest is accepted for the interface's sake: ``mem_efficient_linear`` (torch's linear saves no copies here),
    ``pin_memory`` (the config's ``offload_param`` decides), ``param_swapper``.

    Raises:
        ConfigError: a wrong config or argument; DesyncError: another rank builds another model, or raised;
        CheckpointError, on every rank: weights that cannot be read or do not fit; UsageError: none, or not one model.
    """

    def __init__(
        self,
        module: torch.nn.Module | None = None,
        data_parallel_group: ProcessGroup = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Source | Config = None,
        config: Source | Config = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Mpu = None,
        zero_param_parallel_group: ProcessGroup = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: ProcessGroup = None,
        param_swapper: Anything = None,
        weights: Weights | None = None,
    ) -> None:
        self._entered: list[ExitStack] = []
        source = config_dict_or_path if config_dict_or_path is not None else config
        self.enabled = enabled
        if not enabled:
            return
        # [1] What the arguments and the config say; a stage below 3 ends it here.
        if zero_quantized_weights or zero_quantized_nontrainable_weights:
            raise ConfigError(
                "zero.Init: parameters are sent unquantized, so that numbers do not depend on the number of ranks. "
                "Fix: leave zero_quantized_weights out"
            )
        if remote_device not in (None, "none", "cpu", "nvme"):
            raise ConfigError(
                "zero.Init: remote_device", expected="None, 'cpu' or 'nvme'", found=remote_device
            )
        parsed = None if source is None else parse_config(source)
        dtype = _dtype(dtype, parsed)
        zero = None if parsed is None else parsed.zero_optimization
        self._check(zero)
        if zero is not None and "stage" in zero.model_fields_set and zero.stage != 3:
            self.enabled = False
            return
        if remote_device is None and zero is not None:
            remote_device = zero.offload_param.device
        self._weights = weights
        self._see_apply = zero is None or zero.override_module_apply
        # [2] Which ranks share a parameter. Collective: an engine's groups start with the whole world.
        init_distributed()
        groups = (data_parallel_group, zero_param_parallel_group, sequence_data_parallel_group)
        group = _group(next((group for group in groups if group is not None), None), mpu)
        within = LEASES.with_lanes(group if zero is None else shard_group(group, zero), CHANNELS)
        LEASES.hold(within, self)
        # [3] Where its shards are to lie.
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        arena = arena_of(zero) if remote_device == "nvme" else None
        self.site = Site(group, within, device, dtype, remote_device not in (None, "none"), arena)
        if module is not None:
            with self._build().block() as build:
                build.convert(module)

    def _check(self, zero: ZeroOptimization | None) -> None:
        """What a subclass asks of the config."""

    def __enter__(self) -> Init:
        if self.enabled:
            with ExitStack() as entered:
                build = entered.enter_context(self._build().block())
                # Undone before the block ends: what happens then is not construction.
                entered.enter_context(ModulePatch(build.frame, self._constructor()))
                self._entered.append(entered.pop_all())
            lookup, _ = lazy(__name__)
            lookup(
                "stream_pretrained"
            )()  # what fills it next may be a library that would read all of it on each rank
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self._entered.pop().__exit__(kind, error, trace)

    def _build(self) -> Build:
        built = install_apply if self._see_apply else lambda _: None
        load = None if self._weights is None else partial(load_built, self._weights, self.site.group)
        return Build(self.site, built, load=load)

    def _constructor(self) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """What wraps torch's tensor constructors: looked up now, as other libraries replace it."""
        # Through the table of names: the module that they exchange it in stands above this one.
        lookup, _ = lazy("zeropipe.runtime.zero")
        wrap = lookup("zero_wrapper_for_fp_tensor_constructor")
        dtype, device = self.site.dtype or torch.get_default_dtype(), self.site.device
        return lambda function: wrap(function, target_fp_dtype=dtype, target_device=device)  # type: ignore[no-any-return]


def _group(given: ProcessGroup, mpu: Mpu) -> Group:
    if isinstance(given, Group):
        return given
    if given is None and mpu is not None:
        return with_words(group_of(mpu))
    return with_words(world() if given is None else from_process_group(given))


def _dtype(given: torch.dtype | None, config: Config | None) -> torch.dtype | None:
    """None: each parameter keeps the dtype that it is made with."""
    if given is not None:
        if not given.is_floating_point:
            raise ConfigError("zero.Init: dtype", expected="a floating-point dtype", found=given)
        return given
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get("" if config is None else config.precision)


# ---- constructors, as they run ----

# Around a constructor (of a module) or a function under ``apply`` (None); None from it: nothing is to be done.
Frame = Callable[[torch.nn.Module | None], AbstractContextManager[None] | None]
CONSTRUCTORS = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros")


class ModulePatch:
    """While it is entered, each constructor of a module and each call of a function under ``apply`` runs in a frame.

    ``constructor``: what replaces each of torch's functions that make a tensor.
    """

    def __init__(
        self,
        frame: Frame,
        constructor: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
    ) -> None:
        self.frame = frame
        # Patches nest: the last one in is the first one out, and one whose time is over does nothing even where
        # somebody kept a reference to it.
        self.active = False
        self._constructor = constructor
        self._undo = ExitStack()

    def __enter__(self) -> ModulePatch:
        with ExitStack() as self._undo:  # where it fails midway, everything is as it was
            # Python offers no hook for "the outermost constructor has returned". So each class's own is wrapped; the
            # first wrapper that a new object meets is its outermost. Classes made meanwhile are wrapped as they are
            # made.
            for cls in list(_family(torch.nn.Module)):
                self._wrap(cls)
            self._replace(torch.nn.Module, "__init_subclass__", classmethod(self._subclassing()))
            self._replace(torch.nn.Module, "apply", self._apply())
            for name in CONSTRUCTORS:
                self._replace(torch, name, self._constructor(getattr(torch, name)))
            self._undo = self._undo.pop_all()
        self.active = True
        return self

    def __exit__(self, *_: object) -> None:
        self.active = False
        self._undo.close()

    def _wrap(self, cls: type) -> None:
        """Wrap the constructor of ``cls``, if it is its own or comes from a class that is not a module."""
        if issubclass(cls, torch.jit.ScriptModule):
            return
        original = vars(cls).get("__init__")
        if original is None:
            owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
            if issubclass(owner, torch.nn.Module):
                return  # wrapped there
            original = vars(owner)["__init__"]

        @functools.wraps(original)
        def __init__(module: torch.nn.Module, /, *args: Any, **kwargs: Any) -> None:
            with (self.frame(module) if self.active else None) or nullcontext():
                original.__get__(module, type(module))(*args, **kwargs)

        self._replace(cls, "__init__", __init__)

    def _subclassing(self) -> Callable[..., None]:
        before = vars(torch.nn.Module).get("__init_subclass__")

        def __init_subclass__(cls: Any, /, **kwargs: Any) -> None:
            if before is None:
                super(torch.nn.Module, cls).__init_subclass__(**kwargs)  # type: ignore[misc]
            else:
                before.__func__(cls, **kwargs)
            if self.active:
                self._wrap(cls)

        return __init_subclass__

    def _apply(self) -> Callable[..., Any]:
        before = torch.nn.Module.apply

        @functools.wraps(before)
        def apply(module: torch.nn.Module, fn: Any) -> Any:
            framed = not self.active or isinstance(fn, Framed)
            return before(module, fn if framed else Framed(fn, self.frame))

        return apply

    def _replace(self, owner: Any, name: str, ours: Any) -> None:
        had = vars(owner).get(name, _ABSENT)
        if ours is had:
            return

        def undo() -> None:
            if vars(owner).get(name) is not ours:  # what somebody else has replaced meanwhile stays theirs
                return
            if had is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, had)

        self._undo.callback(undo)
        setattr(owner, name, ours)


class Framed:
    """A function for ``Module.apply`` that runs in a frame of its own for each module."""

    def __init__(self, function: Callable[[torch.nn.Module], Any], frame: Frame) -> None:
        self.function, self.frame = function, frame

    def __call__(self, module: torch.nn.Module) -> Any:
        with self.frame(None) or nullcontext():
            return self.function(module)


def _family(cls: type) -> set[type]:
    """``cls`` and every class below it."""
    found, waiting = {cls}, [cls]
    while waiting:
        below: set[type] = set(type.__subclasses__(waiting.pop())) - found
        found |= below
        waiting += below
    return found


# ---- ``module.apply`` of a model in shards ----

# In each module's own ``__dict__``, so that ``nn.Module`` stays as it is.
_APPLY = "apply"
_ABSENT = object()


def install_apply(module: torch.nn.Module) -> None:
    """Let ``module.apply`` see whole parameters. May be repeated."""
    module.__dict__.setdefault(_APPLY, partial(apply, module))


def remove_apply(module: torch.nn.Module) -> None:
    """Undo ``install_apply``."""
    if getattr(module.__dict__.get(_APPLY), "func", None) is apply:
        del module.__dict__[_APPLY]


def apply(module: torch.nn.Module, fn: Callable[[torch.nn.Module], Any]) -> torch.nn.Module:
    """``nn.Module.apply``: ``fn`` on every module below ``module``, children first; returns ``module``.

    What ``fn`` uses of a parameter that is away is gathered until ``fn`` returns, and what it wrote is cut into
    shards again: rank 0's values, on every rank. Collective where ``fn`` uses such a parameter, else free of
    communication but for parameters that are whole at rest. After an exception no parameter that was away is written.

    Raises:
        DesyncError: ranks used or wrote different parameters.
    """
    whole = type(module).apply
    shards = shards_in(module)
    if isinstance(fn, Framed) or not shards or any(one.building for one in shards):
        return whole(module, fn)
    with _edited(shards) as build:
        return whole(module, Framed(fn, build.frame))


@contextmanager
def _edited(shards: list[Shards]) -> Iterator[Build]:
    """Have a use of any of ``shards`` fetch it, and edits of those that are whole already reach every rank."""
    first = shards[0]
    build = Build(Site(first.everyone, first.group, first.full.device), what="Module.apply")
    here = [one for one in shards if one.gathered]
    with ExitStack() as stack:
        for group in dict.fromkeys(one.everyone for one in here):
            members = [one.param for one in here if one.everyone == group]
            stack.enter_context(GatheredParameters(members, modifier_rank=group.ranks[0]))
        stack.enter_context(built_by(build, shards))
        try:
            yield build
        except BaseException as error:
            if not here:  # else the context of those tells the peers
                build.abandon(error)
            raise
        finally:
            build.stop()
