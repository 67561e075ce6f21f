"""Finds unknown and misplaced keys before validation, and names the key that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from zeropipe.config.fields import AUTO
from zeropipe.config.schema import Config
from zeropipe.errors import ConfigError, describe

# Close enough at the top level to be a slip; "msamp" is 0.75 from "amp" and another program's key.
_TOP_LEVEL_CUTOFF = 0.8
_SECTION_CUTOFF = 0.5
# Keys that editors and people put into JSON files for themselves.
_SILENT = frozenset({"$schema"})
# What people write for keys whose names are not alike.
_MEANT = {
    "zero": "zero_optimization",
    "batch_size": "train_batch_size",
    "micro_batch_size": "train_micro_batch_size_per_gpu",
    "grad_clip": "gradient_clipping",
    "clip_grad": "gradient_clipping",
    "max_grad_norm": "gradient_clipping",
    "gradient_clip_val": "gradient_clipping",
    "float16": "fp16",
}
# Sections whose keys are looked for at the top level too: there they would silently do nothing.
_OFTEN_MISPLACED = ("zero_optimization", "fp16")


def section_of(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model of a key that is a section, or None for a plain value."""
    annotation = model.model_fields[name].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def check_keys(config: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Split the known from the foreign: (the known part, names of foreign top-level keys).

    Raises ConfigError on an unknown key inside a section, and on a top-level key that was meant to be a known one.
    """
    known, foreign = dict[str, Any](), []
    for name, value in config.items():
        if name in Config.model_fields:
            known[name] = value
        elif not isinstance(name, str):
            raise ConfigError(
                f"config key {name!r}", expected="a string", found=type(name).__name__, fix="quote it"
            )
        elif name not in _SILENT:
            _check_foreign(name, value)
            foreign.append(name)
    for name, value in known.items():
        _check_section(Config, name, value, name)
    return known, tuple(foreign)


def _check_foreign(name: str, value: Any) -> None:
    if "." in name:
        return  # a client's own flattened copy of a nested key; reported as foreign
    plain = name.lower().replace("-", "_")
    close = difflib.get_close_matches(plain, Config.model_fields, n=1, cutoff=_TOP_LEVEL_CUTOFF)
    meant = plain if plain in Config.model_fields else _MEANT.get(plain) or (close[0] if close else None)
    if meant is None:
        owner = next(
            (s for s in _OFTEN_MISPLACED if plain in _model(s).model_fields and plain != "enabled"), None
        )
        meant = f"{owner}.{plain}" if owner else None
    if meant is not None:
        raise ConfigError(
            f"unknown config key {name!r} (value {value!r}) looks like {meant!r}",
            fix=f"rename it to {meant!r}, or remove it"
            if "." not in meant
            else f'put it inside its section: "{owner}": {{"{plain}": ...}}',
        )


def _model(name: str) -> type[BaseModel]:
    model = section_of(Config, name)
    assert model is not None
    return model


def _check_section(parent: type[BaseModel], name: str, value: Any, path: str) -> None:
    model = section_of(parent, name)
    if model is None or value is None or value == AUTO:
        return
    if not isinstance(value, dict):
        raise ConfigError(
            f"config key {path!r} is a section",
            expected="an object {...}",
            found=repr(value),
            fix=f'write "{name}": {{{_main_key(model, value)}}}',
        )
    for inner, inner_value in value.items():
        if inner not in model.model_fields:
            raise ConfigError(_unknown(model, str(inner), inner_value, path))
        _check_section(model, inner, inner_value, f"{path}.{inner}")


def _main_key(model: type[BaseModel], value: Any) -> str:
    for name in ("enabled", "stage", "device", "type"):
        if name in model.model_fields:
            shown = "true" if value is True else "false" if value is False else f'"{value}"'
            return f'"{name}": {value if name == "stage" and isinstance(value, int) else shown}'
    return "..."


def _unknown(model: type[BaseModel], name: str, value: Any, path: str) -> str:
    plain = name.lower().replace("-", "_")
    close = difflib.get_close_matches(plain, model.model_fields, n=1, cutoff=_SECTION_CUTOFF)
    owner = next((where for where in _owners(Config, plain, "") if where != path), None)
    what = f"unknown config key {f'{path}.{name}'!r} (value {value!r})"
    if plain in model.model_fields:
        return describe(what, fix=f"write it as {plain!r}")
    if "params" in model.model_fields and not (
        close and difflib.SequenceMatcher(a=plain, b=close[0]).ratio() > 0.8
    ):
        return describe(what, fix=f'arguments go inside "{path}": {{"params": {{"{name}": ...}}}}')
    if owner is not None:
        return describe(what, fix=f"{name!r} belongs in {owner or 'the top level'!r}; move it there")
    known = ", ".join(sorted(model.model_fields))
    if close:
        return describe(f"{what}; the nearest known key is {close[0]!r}", fix=f"rename it to {close[0]!r}")
    return describe(what, expected=f"one of {known}", fix="remove it")


def _owners(model: type[BaseModel], name: str, path: str) -> Iterator[str]:
    if name in ("enabled", "type", "params"):
        return
    if name in model.model_fields:
        yield path
    for inner in model.model_fields:
        child = section_of(model, inner)
        if child is not None:
            yield from _owners(child, name, f"{path}.{inner}" if path else inner)
