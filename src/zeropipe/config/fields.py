"""The vocabulary that the schema is written in: types that forgive what JSON writes, and marks that say what a key does
here, so that the parser, the checks, the notices and the reference all read one fact.

Keys that users' configurations have and that change nothing here, or are refused, stand in ``keys_without_effect.json``
by section: what the key was for where it comes from, and either what happens ``instead`` of it, or why it is
``refused`` and the ``fix``. ``in_use`` says which values ask for something: by default any but the ``default``;
"enabled" a section that switches something on; "not empty" any value that is true.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model
from pydantic.fields import FieldInfo

from zeropipe.given import Json

AUTO = "auto"


def key(default: Json, text: str, **limits: Any) -> Any:
    """A configuration key: its default, what it does, and the limits of its value."""
    return Field(default=default, description=text, **limits)


class Section(BaseModel):
    """A JSON object of the configuration; frozen, because every rank agreed on it before the first step."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=True, protected_namespaces=())

    def chosen(self, name: str) -> Any:
        """The value of a key that the user gave; None where it is left to whoever reads it."""
        return getattr(self, name) if name in self.model_fields_set else None


def section_of(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model of a key that is a section, or None for a plain value."""
    annotation = model.model_fields[name].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def every_key(
    model: type[BaseModel], prefix: str = ""
) -> Iterator[tuple[str, FieldInfo, type[BaseModel] | None]]:
    """The keys of a section and of the sections in it, in the order of the schema: dotted path, key, its section."""
    for name, info in model.model_fields.items():
        section = section_of(model, name)
        yield f"{prefix}{name}", info, section
        if section is not None:
            yield from every_key(section, f"{prefix}{name}.")


def _no_bool(value: Any) -> Any:
    # JSON's true would silently become 1: a batch size of "true" is a slip, not a number.
    if isinstance(value, bool):
        raise ValueError("a number, not true or false")
    return value


# A whole number; 5e8 is one too, because JSON has no other short way to write it.
Count = Annotated[int, BeforeValidator(_no_bool)]
Real = Annotated[float, BeforeValidator(_no_bool)]
Lowercase = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)

_DTYPES = {
    "fp32": "fp32", "float32": "fp32", "float": "fp32",
    "fp16": "fp16", "float16": "fp16", "half": "fp16",
    "bf16": "bf16", "bfloat16": "bf16",
}  # fmt: skip
# A torch.dtype in a dict given from Python prints as "torch.float16"; this layer never imports torch.
Dtype = Annotated[
    Literal["fp32", "fp16", "bf16"],
    BeforeValidator(lambda value: _DTYPES.get(str(value).removeprefix("torch.").lower(), value)),
]


@dataclass(frozen=True, slots=True)
class Mark:
    """The key is known and changes nothing here; with a ``fix`` any use of it is an error: results would differ."""

    why: str  # it is refused, or what happens instead
    fix: str | None
    in_use: Callable[[object], bool] | None  # None: any value other than the default


def mark_of(metadata: list[Any]) -> Mark | None:
    """The mark among the ``Annotated`` metadata of a key, if it has one."""
    return next((item for item in metadata if isinstance(item, Mark)), None)


_Model = TypeVar("_Model", bound=type[Section])


def with_keys_without_effect(section: str) -> Callable[[_Model], _Model]:
    """Add to a section's model the keys that the data file has for it; ``""`` is the top level."""

    # 90 of 195 keys: as lines of the schema they would hide those that do something.
    def extended(model: _Model) -> _Model:
        fields: dict[str, Any] = {
            name: _field(entry) for name, entry in _keys_without_effect()[section].items()
        }
        return create_model(  # type: ignore[return-value]
            model.__name__, __base__=model, __doc__=model.__doc__, __module__=model.__module__, **fields
        )

    return extended


@cache
def _keys_without_effect() -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads(resources.files(__package__).joinpath("keys_without_effect.json").read_text("utf-8"))


def _field(entry: dict[str, Any]) -> tuple[Any, Any]:
    """A key of the data file as pydantic wants it. A list as its type is a choice of words."""
    # With a ``fix`` it is refused, without one passed over: the two never stand together.
    kind = entry["type"]
    why, fix = (entry["refused"], entry["fix"]) if "refused" in entry else (entry["instead"], None)
    mark = Mark(why, fix, _IN_USE[entry["in_use"]] if "in_use" in entry else None)
    of = Annotated[Literal[tuple(kind)], Lowercase] if isinstance(kind, list) else _TYPES[kind]  # type: ignore[valid-type]
    limits = {name: entry[name] for name in ("gt", "ge", "le") if name in entry}
    return Annotated[of, mark], key(entry["default"], entry["was_for"], **limits)


_TYPES: dict[str, Any] = {
    "any": Any,
    "dtype or null": Dtype | None,
    "list or null": list[str] | None,
    "number": Real,
    "object": dict[str, Any],
    "object or null": dict[str, Any] | None,
    "string or null": str | None,
    "true/false": bool,
    "whole number": Count,
    "whole number or null": Count | None,
}


def _switched_on(value: object) -> bool:
    """Whether there is any ``"enabled": true`` inside."""
    return isinstance(value, dict) and any(
        (name == "enabled" and inner not in (False, 0, "false", AUTO)) or _switched_on(inner)
        for name, inner in value.items()
    )


_IN_USE: dict[str, Callable[[object], bool]] = {
    "enabled": _switched_on,
    "deepcompile": lambda value: isinstance(value, dict) and bool(value.get("deepcompile")),
    "not empty": bool,
}
