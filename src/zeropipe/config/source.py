"""Reads a configuration from wherever the user keeps it, and says where a malformed one is wrong."""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zeropipe.errors import ConfigError

Source = Mapping[str, Any] | str | os.PathLike[str] | None


def read_source(source: Source) -> dict[str, Any]:
    """The configuration as a dict: the given dict itself, a JSON file's, JSON text's, or base64 of JSON text.

    Raises ConfigError when there is no such file, or when it is not a JSON object.
    """
    if source is None:
        return {}
    if isinstance(source, dict):
        return source
    if isinstance(source, Mapping):
        return {name: _plain(value) for name, value in source.items()}
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return parse_json(source, "the JSON text given as config")
    if isinstance(source, str | os.PathLike):
        return _read_path(source)
    raise ConfigError(
        "config cannot be read",
        expected="a dict, a path of a JSON file, or None",
        found=type(source).__name__,
        fix="pass config={...} or config='my.json'",
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return value


def _read_path(source: str | os.PathLike[str]) -> dict[str, Any]:
    path = Path(source)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        text = _from_base64(source) if isinstance(source, str) else None
        if text is not None:
            return parse_json(text, "the base64 text given as config")
        shown = str(source) if len(str(source)) <= 200 else f"{str(source)[:200]}..."
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"config file cannot be read: {shown!r} (looked in {str(Path.cwd())!r}): {reason}",
            fix="give the path of an existing JSON file, or a dict",
        ) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"config file {str(path)!r} is not text: byte {error.start} is not UTF-8",
            fix="give a JSON file saved as UTF-8",
        ) from None
    return parse_json(text, str(path))


def _from_base64(text: str) -> str | None:
    # Launchers pass the whole configuration as one url-safe base64 word on the command line.
    try:
        decoded = base64.b64decode(text, altchars=b"-_", validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    return decoded if decoded.lstrip().startswith("{") else None


def parse_json(text: str, where: str) -> dict[str, Any]:
    """Parse a JSON object strictly: duplicate keys, comments and trailing commas are errors with their place."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for name, value in pairs:
            if name in seen:
                raise ConfigError(
                    f"{where}: key {name!r} is given twice in one object, as {seen[name]!r} and {value!r}",
                    fix=f"keep one of the two lines that give {name!r}",
                )
            seen[name] = value
        return seen

    try:
        value = json.loads(text, object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as error:
        what, fix = _diagnose(text, error)
        raise ConfigError(f"{where}: line {error.lineno} column {error.colno}: {what}", fix=fix) from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply", fix="this is no configuration") from None
    if not isinstance(value, dict):
        raise ConfigError(
                f"{where} holds no JSON object", expected="{...}", found=type(value).__name__,
                fix="wrap the settings in { and }",
            )  # fmt: skip
    return value


def _diagnose(text: str, error: json.JSONDecodeError) -> tuple[str, str]:
    rest, before = text[error.pos :], text[: error.pos].rstrip()
    if not text.strip():
        return "the file is empty", "write {} for all defaults"
    if rest.startswith(("//", "/*", "#")):
        return "JSON has no comments", "remove the comment"
    after_comma = rest[1:].lstrip() if rest.startswith(",") else ""
    if (rest[:1] in ("}", "]") and before.endswith(",")) or after_comma[:1] in ("}", "]"):
        return f"a comma before {(after_comma or rest)[:1]!r}", "remove the last comma"
    if rest.startswith("'"):
        return "single quotes", 'write strings with double quotes: "name"'
    for python, proper in (("True", "true"), ("False", "false"), ("None", "null")):
        if rest.startswith(python):
            return f"{python} is Python, not JSON", f"write {proper}"
    return error.msg, "correct the JSON there"
