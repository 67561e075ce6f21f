"""Lets our files name two DeepSpeed classes without importing DeepSpeed, so that DeepSpeed reads them back.

Pickle refuses to name a class that it cannot import. This pickler writes the name itself for the stand-ins;
``torch.save(..., pickle_module=naming)`` uses it.
"""

from __future__ import annotations

import pickle
from typing import Any, ClassVar

from zeropipe.checkpoint.stand_ins import STAND_INS, FragmentAddress, LossScalerValues

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


def is_plain(value: Any) -> bool:
    """Whether ``value`` can be read back without running code: tensors, plain values and containers of them."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return type(value) in _PLAIN and value != b""  # torch's reader does not know empty bytes
    module = type(value).__module__
    if type(value) in (list, tuple, set, frozenset):
        return type(value) is not frozenset and all(map(is_plain, value))
    if isinstance(value, dict):
        return f"{module}.{type(value).__name__}" in _DICTS and all(
            is_plain(k) and is_plain(v) for k, v in value.items()
        )
    return f"{module}.{type(value).__name__}" in _TENSORS


_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_DICTS = ("builtins.dict", "collections.OrderedDict")
_TENSORS = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.Size", "torch.dtype", "torch.device")
