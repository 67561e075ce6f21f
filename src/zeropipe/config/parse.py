"""Parses a configuration: the one way from a dict, a file or base64 text to a checked ``Config``."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from zeropipe.config import notices
from zeropipe.config.checks import check_config
from zeropipe.config.explain import explain
from zeropipe.config.fields import AUTO
from zeropipe.config.keys import check_keys, section_of
from zeropipe.config.legacy import modernize
from zeropipe.config.notices import Notice
from zeropipe.config.schema import Config
from zeropipe.config.source import Source, read_source
from zeropipe.errors import ConfigError


def parse_config(source: Source | Config) -> Config:
    """Parse and check a configuration given as a dict, a path, JSON text, base64 text, or None (all defaults).

    "auto" means unset, and is remembered (``Config.is_auto``). Nothing is logged: see ``Config.notices``.
    Raises ConfigError naming the key, the value and the fix.
    """
    if isinstance(source, Config):
        return source
    raw = read_source(source)
    modern, renamed = modernize(raw)
    known, foreign = check_keys(modern)
    auto: set[str] = set()
    try:
        config = Config.model_validate(_without_unset(Config, known, "", auto))
    except ValidationError as error:
        raise ConfigError(explain(error)) from None
    config._raw = raw
    config._auto = frozenset(auto)
    config._notices = _notices(foreign, check_config(config), renamed)
    return config


def DeepSpeedConfig(config: Source | Config, mpu: object = None, mesh_device: object = None) -> Config:
    """``parse_config`` under the name that scripts look up, with its arguments; only ``config`` is read."""
    return parse_config(config)


def _notices(foreign: tuple[str, ...], idle: dict[str, str], renamed: dict[str, str]) -> tuple[Notice, ...]:
    found = []
    if foreign:
        found.append(notices.foreign(foreign))
    if idle:
        found.append(notices.no_effect(idle))
    if renamed:
        found.append(notices.renamed(renamed))
    return tuple(found)


def _without_unset(
    model: type[BaseModel] | None, value: dict[str, Any], prefix: str, auto: set[str]
) -> dict[str, Any]:
    """A copy without "auto" values, whose paths go into ``auto``, and without null sections."""
    kept = {}
    for name, inner in value.items():
        path = f"{prefix}{name}"
        section = section_of(model, name) if model is not None else None
        if isinstance(inner, str) and inner == AUTO:
            auto.add(path)
        elif (
            inner is None
            and model is not None
            and isinstance(model.model_fields[name].default, dict | BaseModel)
        ):
            continue
        elif isinstance(inner, dict):
            kept[name] = _without_unset(section, inner, f"{path}.", auto)
        else:
            kept[name] = inner
    return kept
