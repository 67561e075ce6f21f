"""zero.Init: inside it a model is built shard by shard, so that no rank ever holds more than one module whole.

    with zero.Init(config_dict_or_path=config):
        model = Model()

When a module's outermost constructor returns, the module's parameters are cut and freed. Whatever the outer
constructors then do with them (their own initialization, tying, ``apply``) gathers them again for as long as the
constructor runs, and what was written is cut anew; so the weights are those of a plain construction. Later
``module.apply(fn)`` of such a model lets ``fn`` find and edit whole parameters in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch

from zeropipe.comm.group import Group, from_process_group, init_distributed, world
from zeropipe.comm.leases import LEASES
from zeropipe.config.parse import parse_config
from zeropipe.errors import ConfigError
from zeropipe.names import lazy
from zeropipe.runtime.zero.gather.build import Build
from zeropipe.runtime.zero.gather.module_patch import Framed, ModulePatch
from zeropipe.runtime.zero.gather.shards import Shards, shards_in
from zeropipe.runtime.zero.gather.state_dict import built_by
from zeropipe.runtime.zero.gather.whole import GatheredParameters
from zeropipe.runtime.zero.hold.offload import arena_of
from zeropipe.runtime.zero.replication import shard_group


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

    The rest is accepted for the interface's sake: ``mem_efficient_linear`` (torch's linear saves no copies here),
    ``pin_memory`` (the config's ``offload_param`` decides), ``param_swapper``.

    Raises:
        ConfigError: a wrong config or argument; DesyncError: another rank builds another model, or raised.
    """

    def __init__(
        self,
        module: torch.nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: Any = None,
        param_swapper: Any = None,
    ) -> None:
        self._entered: list[tuple[Build, ModulePatch]] = []
        source = config_dict_or_path if config_dict_or_path is not None else config
        self.enabled = enabled
        if not enabled:
            return
        if zero_quantized_weights or zero_quantized_nontrainable_weights:
            raise ConfigError(
                "zero.Init: parameters are sent unquantized, so that numbers do not depend on the number of ranks. "
                "Fix: leave zero_quantized_weights out"
            )
        if remote_device not in (None, "none", "cpu", "nvme"):
            raise ConfigError(
                "zero.Init: remote_device", expected="None, 'cpu' or 'nvme'", found=remote_device
            )
        self.remote_device = None if remote_device == "none" else remote_device
        self.dtype = _dtype(dtype, source)
        zero = None if source is None else parse_config(source).zero_optimization
        self._apply = zero is None or zero.override_module_apply
        if zero is not None:
            if "stage" in zero.model_fields_set and zero.stage != 3:
                self.enabled = False
                return
            if remote_device is None and zero.offload_param.device != "none":
                self.remote_device = zero.offload_param.device
        init_distributed()
        groups = (data_parallel_group, zero_param_parallel_group, sequence_data_parallel_group)
        self.group = _group(next((group for group in groups if group is not None), None), mpu)
        self.within = self.group if zero is None else shard_group(self.group, zero)
        LEASES.hold(self.within, self)
        self._arena = arena_of(zero) if self.remote_device == "nvme" else None
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        if module is not None:
            self._build().convert(module)

    def __enter__(self) -> Init:
        if not self.enabled:
            return self
        build = self._build()
        patch = ModulePatch(build, self._constructor())
        patch.install()
        self._entered.append((build, patch))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.enabled:
            return
        build, patch = self._entered.pop()
        patch.remove()
        if error is not None:
            build.abandon(error)
            return
        try:
            build.finish()
        except BaseException as late:
            build.abandon(late)
            raise

    def _build(self) -> Build:
        return Build(
            self.group,
            self.within,
            self.device,
            self.dtype,
            self.remote_device,
            self._arena,
            built=install_apply if self._apply else lambda _: None,
        )

    def _constructor(self) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """What wraps torch's tensor constructors: looked up now, as other libraries replace it."""
        # Through the table of names: the module that they exchange it in stands above this one.
        lookup, _ = lazy("zeropipe.runtime.zero")
        wrap, dtype = (
            lookup("zero_wrapper_for_fp_tensor_constructor"),
            self.dtype or torch.get_default_dtype(),
        )
        return lambda function: wrap(function, target_fp_dtype=dtype, target_device=self.device)  # type: ignore[no-any-return]


def _group(given: Any, mpu: Any) -> Group:
    if isinstance(given, Group):
        return given
    if given is None and mpu is not None:
        own = getattr(mpu, "data_group", None)
        return own if isinstance(own, Group) else from_process_group(mpu.get_data_parallel_group())
    return world() if given is None else from_process_group(given)


def _dtype(given: torch.dtype | None, source: Any) -> torch.dtype | None:
    """None: each parameter keeps the dtype that it is made with."""
    if given is not None:
        if not given.is_floating_point:
            raise ConfigError("zero.Init: dtype", expected="a floating-point dtype", found=given)
        return given
    precision = "fp32" if source is None else parse_config(source).precision
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)


# In each module's own ``__dict__``, so that ``nn.Module`` stays as it is.
_APPLY = "apply"


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
        return whole(module, Framed(fn, build))


@contextmanager
def _edited(shards: list[Shards]) -> Iterator[Build]:
    """Have a use of any of ``shards`` fetch it, and edits of those that are whole already reach every rank."""
    first = shards[0]
    build = Build(first.everyone, first.group, first.full.device, None, None, None, what="Module.apply")
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
            build.active = False
