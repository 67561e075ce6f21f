"""Parses a configuration: the one way from a dict, a file or base64 text to a checked ``Config``.

source  --read_source-->  dict  --modernize-->  present names  --check_keys-->  known keys  --Config-->  checked
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from zeropipe.config.checks import check_config
from zeropipe.config.explain import check_keys, explain
from zeropipe.config.fields import AUTO, section_of
from zeropipe.config.schema import Config, Notice, NoticeKind
from zeropipe.config.source import Source, modernize, read_source
from zeropipe.errors import ConfigError


def parse_config(source: Source | Config) -> Config:
    """Parse and check a configuration given as a dict, a path, JSON text, base64 text, or None (all defaults).

    "auto" means unset, and is remembered (``Config.is_auto``). Nothing is logged: see ``Config.notices``.
    Raises ConfigError naming the key, the value and the fix.
    """
    if isinstance(source, Config):
        return source
    # [1] What was given, with present names.
    raw = read_source(source)
    modern, renamed = modernize(raw)
    # [2] Keys before values: of a misspelt key the value says nothing.
    known, foreign = check_keys(modern)
    auto: set[str] = set()
    try:
        config = Config.model_validate(_without_unset(Config, known, "", auto))
    except ValidationError as error:
        raise ConfigError(explain(error)) from None
    # [3] What only keys together say.
    idle = check_config(config, auto)
    return config.parsed_from(raw, frozenset(auto), tuple(_notices(foreign, idle, renamed)))


def DeepSpeedConfig(config: Source | Config, mpu: object = None, mesh_device: object = None) -> Config:
    """``parse_config`` under the name that scripts look up, with its arguments; only ``config`` is read."""
    return parse_config(config)


def _notices(foreign: tuple[str, ...], idle: dict[str, str], renamed: dict[str, str]) -> Iterator[Notice]:
    """``foreign``: names at the top level. ``idle``: key -> what happens instead. ``renamed``: old -> new name."""
    if foreign:
        text = f"passed over {len(foreign)} key(s) that zeropipe does not know: {', '.join(foreign)}"
        dotted = next((name for name in foreign if "." in name), None)
        if dotted:
            nested = dotted.replace(".", " -> ")
            text += f" (a dotted name is not read as a path: write {nested} as nested objects)"
        yield Notice(NoticeKind.FOREIGN, foreign, f"configuration: {text}")
    if idle:
        listed = "; ".join(f"{name} ({why})" for name, why in idle.items())
        text = f"configuration: these keys have no effect here: {listed}"
        yield Notice(NoticeKind.NO_EFFECT, tuple(idle), text)
    if renamed:
        listed = ", ".join(f"{old} -> {new}" for old, new in renamed.items())
        text = f"configuration: old names read as new ones: {listed}"
        yield Notice(NoticeKind.RENAMED, tuple(renamed), text)


def _without_unset(
    model: type[BaseModel] | None, value: dict[str, Any], prefix: str, auto: set[str]
) -> dict[str, Any]:
    """A copy without "auto" values, whose paths go into ``auto``, and without null sections."""
    kept = {}
    for name, inner in value.items():
        path = f"{prefix}{name}"
        if isinstance(inner, str) and inner == AUTO:
            auto.add(path)
        elif isinstance(inner, dict):
            section = None if model is None else section_of(model, name)
            kept[name] = _without_unset(section, inner, f"{path}.", auto)
        elif (
            inner is not None
            or model is None
            or not isinstance(model.model_fields[name].default, dict | BaseModel)
        ):
            kept[name] = inner
    return kept
