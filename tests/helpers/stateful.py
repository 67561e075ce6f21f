"""Modules whose own code takes part in saving and loading: what torch has of them, and what users write."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.ao import quantization
from torch.nn.utils import parametrizations, parametrize

WIDTH = 8
_Arguments = tuple[dict[str, Any], str, dict[str, Any], bool, list[str], list[str], list[str]]


class Packed(nn.Module):
    """Saved as one tensor, taken apart by a hook of the load."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_state_dict_post_hook(self._pack)
        self.register_load_state_dict_pre_hook(self._unpack)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) + self.k(x).tanh()

    @staticmethod
    def _pack(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        parts = [state.pop(f"{prefix}{name}.weight") for name in "qk"]
        state[f"{prefix}packed"] = torch.cat(parts)

    @staticmethod
    def _unpack(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if f"{prefix}packed" in state:
            for name, part in zip("qk", state.pop(f"{prefix}packed").chunk(2), strict=True):
                state[f"{prefix}{name}.weight"] = part


class Renamed(nn.Module):
    """Keys have another name on the disk; the whole subtree is renamed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
        self.register_state_dict_post_hook(lambda m, s, p, _: rename(s, f"{p}inner.", f"{p}old."))
        self.register_load_state_dict_pre_hook(lambda m, s, p, *_: rename(s, f"{p}old.", f"{p}inner."))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def rename(state: dict[str, Any], old: str, new: str) -> None:
    for key in [key for key in state if key.startswith(old)]:
        state[new + key.removeprefix(old)] = state.pop(key)


class Transposed(nn.Linear):
    """Overrides both ways; the values on the disk are others than the parameter's."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight.detach().t() * 2

    def _load_from_state_dict(self, *arguments: Any) -> None:
        state, prefix = arguments[0], arguments[1]
        state[f"{prefix}weight"] = state[f"{prefix}weight"].t() / 2
        super()._load_from_state_dict(*arguments)


class Assigned(nn.Linear):
    """Puts new parameters in place of its own, and a plain attribute beside them."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.scale = torch.ones(1)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}scale"] = self.scale

    def _load_from_state_dict(self, *arguments: Any) -> None:
        state, prefix = arguments[0], arguments[1]
        self.weight = nn.Parameter(state[f"{prefix}weight"])
        self.bias.data = state[f"{prefix}bias"].clone()
        self.scale = state[f"{prefix}scale"]


class Extra(nn.Linear):
    """State of its own: ``kind`` is what stands for it in the state dict."""

    def __init__(self, kind: str) -> None:
        super().__init__(WIDTH, WIDTH)
        self.kind = kind
        self.history: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.history.append(float(len(self.history)))
        return super().forward(x)

    def get_extra_state(self) -> Any:
        if self.kind == "tensor":  # of a size that depends on what was seen
            return torch.tensor(self.history)
        if self.kind == "words":
            return {"history": self.history, "seen": set(self.history)}
        file = io.BytesIO()
        torch.save(self.history, file)
        return file.getvalue()

    def set_extra_state(self, state: Any) -> None:
        if self.kind == "tensor":
            self.history = state.tolist()
        elif self.kind == "words":
            assert type(state["seen"]) is set
            self.history = list(state["history"])
        else:
            self.history = torch.load(io.BytesIO(state))


class Derived(nn.Linear):
    """A hook after the load makes a buffer from the weights and forgives a key that is not saved."""

    norm: torch.Tensor

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.register_buffer("norm", torch.zeros(()), persistent=False)
        self.register_buffer("late", torch.zeros(1))
        self.register_load_state_dict_post_hook(self._after)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}late"]

    @staticmethod
    def _after(module: Any, incompatible: Any) -> None:
        with torch.no_grad():
            module.norm.copy_(module.weight.norm())
        incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if not k.endswith("late")]


class LoadsItself(nn.Sequential):
    """The root: its state dict has one more word before each key."""

    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        state = super().state_dict(*arguments, **named)
        return {f"net.{key}": value for key, value in state.items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        plain = {key.removeprefix("net."): value for key, value in state_dict.items()}
        return super().load_state_dict(plain, strict, assign)


class Attention(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(WIDTH, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x[None], x[None], x[None])[0][0]


class Observed(nn.Module):
    """A linear layer behind what quantization puts on it, which keeps statistics of other sizes than at first."""

    def __init__(self, observer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.observer, self.linear = observer(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x + 0 * self.observer(x))


class Halved(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def parametrized() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(layer, "weight", Halved())
    return layer


def lazy() -> nn.Module:
    layer = nn.LazyLinear(WIDTH)
    layer(torch.zeros(1, WIDTH))
    return layer


def reparametrized(function: Callable[..., Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: nn.Module = function(nn.Linear(WIDTH, WIDTH))
        return made

    return make


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm1d(WIDTH),
    "InstanceNorm": lambda: nn.InstanceNorm1d(WIDTH, affine=True, track_running_stats=True),
    "MultiheadAttention": Attention,
    "weight_norm": reparametrized(nn.utils.weight_norm),
    "spectral_norm": reparametrized(nn.utils.spectral_norm),
    "parametrized weight_norm": reparametrized(parametrizations.weight_norm),
    "parametrized spectral_norm": reparametrized(parametrizations.spectral_norm),
    "parametrized orthogonal": reparametrized(parametrizations.orthogonal),
    "parametrized": parametrized,
    "lazy": lazy,
    "MinMaxObserver": lambda: Observed(quantization.MinMaxObserver),
    "PerChannelMinMaxObserver": lambda: Observed(lambda: quantization.PerChannelMinMaxObserver(ch_axis=1)),
    "HistogramObserver": lambda: Observed(quantization.HistogramObserver),
    "FakeQuantize": lambda: Observed(quantization.FakeQuantize),
    "packed": Packed,
    "renamed": Renamed,
    "transposed": Transposed,
    "assigned": Assigned,
    "derived": Derived,
    "extra state, words": lambda: Extra("words"),
    "extra state, a tensor": lambda: Extra("tensor"),
    "extra state, bytes": lambda: Extra("bytes"),
}
OLD_SPECTRAL = {"spectral_norm", "weight_norm"}  # which stage 3 cannot train


def model_of(name: str) -> nn.Module:
    if name == "the root":
        return LoadsItself(Packed(), nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    return nn.Sequential(STATEFUL[name](), nn.Linear(WIDTH, WIDTH))
