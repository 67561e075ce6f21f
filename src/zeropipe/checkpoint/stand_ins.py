"""Stand-ins for the three classes that DeepSpeed's files name: read without running code, written without DeepSpeed.

They carry the saved values and do nothing. ``STAND_INS`` is given to torch's weights-only unpickler; this module
itself is given to ``torch.save(..., pickle_module=stand_ins)``, because pickle refuses to name a class that it cannot
import: the pickler below writes the name itself, so that DeepSpeed reads our files back.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, ClassVar


class LossScalerValues:
    """``deepspeed.runtime.fp16.loss_scaler.LossScaler`` and ``DynamicLossScaler``: their fields, by name."""

    def __init__(self, *args: Any) -> None:
        if args:
            self.cur_scale = args[0]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def values(self) -> dict[str, Any]:
        return dict(self.__dict__)


class StageValue(int):
    """``deepspeed.runtime.zero.config.ZeroStageEnum``: an int."""


class FragmentAddress:
    """``deepspeed.utils.tensor_fragment.fragment_address``: where a shard holds a parameter, in elements."""

    def __init__(self, numel: int = 0, start: int = 0) -> None:
        self.numel = numel
        self.start = start


STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (LossScalerValues, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (LossScalerValues, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (StageValue, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
]

# What ``torch.save`` looks up in the module that it is given.
load, loads, dump, dumps = pickle.load, pickle.loads, pickle.dump, pickle.dumps


class Unpickler(pickle.Unpickler):
    """For trusted files: any class, but DeepSpeed's names still become the stand-ins."""

    def find_class(self, module: str, name: str) -> Any:
        for entry in STAND_INS:
            if isinstance(entry, tuple) and entry[1] == f"{module}.{name}":
                return entry[0]
        return super().find_class(module, name)


# The Python one: only it can be taught to write a name. Its methods are not in the type stubs.
_Pickler: Any = pickle._Pickler


class Pickler(_Pickler):
    dispatch: ClassVar[dict[Any, Any]] = dict(_Pickler.dispatch)

    def save_fragment(self, address: FragmentAddress) -> None:
        self.write(pickle.GLOBAL + b"deepspeed.utils.tensor_fragment\nfragment_address\n")
        self.save((address.numel, address.start))
        self.write(pickle.REDUCE)

    def save_scaler(self, scaler: LossScalerValues) -> None:
        name = b"DynamicLossScaler" if scaler.values().get("dynamic") else b"LossScaler"
        self.write(pickle.GLOBAL + b"deepspeed.runtime.fp16.loss_scaler\n" + name + b"\n")
        self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        self.save(scaler.values())
        self.write(pickle.BUILD)

    dispatch[FragmentAddress] = save_fragment
    dispatch[LossScalerValues] = save_scaler
