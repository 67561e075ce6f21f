"""The vocabulary that the schema is written in: number types that forgive what JSON writes, and marks that
say what a key does here, so that the parser, the checks, the notices and the reference all read one fact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

AUTO = "auto"


def key(default: Any, text: str, **limits: Any) -> Any:
    """A configuration key: its default, what it does, and the limits of its value."""
    return Field(default=default, description=text, **limits)


class Section(BaseModel):
    """A JSON object of the configuration; frozen, because every rank agreed on it before the first step."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=True, protected_namespaces=())


def _no_bool(value: Any) -> Any:
    # JSON's true would silently become 1: a batch size of "true" is a slip, not a number.
    if isinstance(value, bool):
        raise ValueError("a number, not true or false")
    return value


# A whole number; 5e8 is one too, because JSON has no other short way to write it.
Count = Annotated[int, BeforeValidator(_no_bool)]
Real = Annotated[float, BeforeValidator(_no_bool)]

_DTYPES = {
    "fp32": "fp32", "float32": "fp32", "float": "fp32",
    "fp16": "fp16", "float16": "fp16", "half": "fp16",
    "bf16": "bf16", "bfloat16": "bf16",
}  # fmt: skip


def _short_dtype(value: Any) -> Any:
    # A torch.dtype in a dict given from Python prints as "torch.float16"; this layer never imports torch.
    return _DTYPES.get(str(value).removeprefix("torch.").lower(), value)


Dtype = Annotated[Literal["fp32", "fp16", "bf16"], BeforeValidator(_short_dtype)]


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


@dataclass(frozen=True, slots=True)
class NoEffect:
    """The key is known and changes nothing here; ``why`` says what happens instead."""

    why: str
    in_use: Callable[[object], bool] | None = None  # None: any value other than the default


@dataclass(frozen=True, slots=True)
class Refused:
    """The key would change results and is not offered: any use of it is an error that gives ``fix``."""

    why: str
    fix: str
    in_use: Callable[[object], bool] | None = None  # None: any value other than the default


Mark = NoEffect | Refused


def mark_of(metadata: list[Any]) -> Mark | None:
    """The mark among the ``Annotated`` metadata of a key, if it has one."""
    return next((item for item in metadata if isinstance(item, NoEffect | Refused)), None)


Lowercase = BeforeValidator(_lower)
