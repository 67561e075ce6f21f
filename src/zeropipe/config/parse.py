"""Parses a configuration: the one way from a dict, a file or base64 text to a checked ``Config``.

source --read_source--> dict --modernize--> present names --check_keys--> known keys --Config--> --check_config-->

A malformed source is an error that says where it is wrong; older names and forms get their present ones before
anything else looks at them.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from zeropipe.config.checks import check_config
from zeropipe.config.explain import check_keys, explain
from zeropipe.config.schema import Config
from zeropipe.errors import ConfigError

Source = Mapping[str, Any] | str | os.PathLike[str] | None


def parse_config(source: Source | Config) -> Config:
    """Parse and check a configuration given as a dict, a path, JSON text, base64 text, or None (all defaults).

    "auto" means unset, and is remembered (``Config.is_auto``). Nothing is logged: see ``Config.notices``.
    Raises ConfigError naming the key, the value and the fix.

    In a process that knows zeropipe as ``deepspeed``, unknown keys and a comma too many are passed over with a
    warning, as scripts are used to; what would change results is an error there, too.
    """
    if isinstance(source, Config):
        return source
    lenient = bool(getattr(sys.modules.get("deepspeed"), "__zeropipe__", False))
    # [1] What was given, with present names.
    raw = read_source(source, lenient)
    modern, renamed = modernize(raw)
    # [2] Keys before values: of a misspelt key the value says nothing.
    known, foreign, auto = check_keys(modern, lenient)
    try:
        config = Config.model_validate(known)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None
    # [3] What only keys together say.
    idle = check_config(config, auto)
    return config.parsed_from(raw, auto, foreign, idle, renamed)


def only_one(every: Mapping[str, Any]) -> Any:
    """The one configuration that is there, of ``{where: configuration}``; ConfigError for none or for several."""
    given = {where: found for where, found in every.items() if found is not None}
    # Launchers put what they pass as config into args too.
    if len(given) > 1 and any(found is not every["config"] for found in given.values()):
        raise ConfigError(
            f"initialize: configuration given twice, as {' and '.join(given)}. Fix: give one of them"
        )
    if not given:
        raise ConfigError("initialize: no configuration. Fix: pass config= a dict or the path of a JSON file")
    return next(iter(given.values()))


# ---- from where the user keeps it ----


def read_source(source: Source, lenient: bool = False) -> dict[str, Any]:
    """The configuration as a dict: the given dict itself, a JSON file's, JSON text's, or base64 of JSON text.

    Raises ConfigError when there is no such file, or when it is not a JSON object.
    """
    if source is None:
        return {}
    if isinstance(source, dict):
        return source
    if isinstance(source, Mapping):
        return _plain(source)
    # A path never begins with a brace.
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return parse_json(source, "the JSON text given as config", lenient)
    if isinstance(source, str | os.PathLike):
        return _read_path(source, lenient)
    raise ConfigError(
        "config cannot be read",
        expected="a dict, a path of a JSON file, or None",
        found=type(source).__name__,
        fix="pass config={...} or config='my.json'",
    )


def _plain(value: Any) -> Any:
    return {n: _plain(inner) for n, inner in value.items()} if isinstance(value, Mapping) else value


def _read_path(source: str | os.PathLike[str], lenient: bool) -> dict[str, Any]:
    path = Path(source)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        text = _from_base64(source) if isinstance(source, str) else None
        if text is not None:
            return parse_json(text, "the base64 text given as config", lenient)
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
    return parse_json(text, str(path), lenient)


def _from_base64(text: str) -> str | None:
    # Launchers pass the whole configuration as one url-safe base64 word on the command line.
    try:
        decoded = base64.b64decode(text, altchars=b"-_", validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    return decoded if decoded.lstrip().startswith("{") else None


# A string, which is kept as it is, or a comma that nothing follows.
_LAST_COMMA = re.compile(r'("(?:\\.|[^"\\])*")|,(?=\s*[}\]])')


def parse_json(text: str, where: str, lenient: bool = False) -> dict[str, Any]:
    """Parse a JSON object strictly: duplicate keys, comments and trailing commas are errors with their place.

    ``lenient``: a comma before a closing bracket is taken.
    """
    if lenient:
        text = _LAST_COMMA.sub(lambda found: found[1] or "", text)

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
            f"{where} holds no JSON object",
            expected="{...}",
            found=type(value).__name__,
            fix="wrap the settings in { and }",
        )
    return value


def _diagnose(text: str, error: json.JSONDecodeError) -> tuple[str, str]:
    # What people write from Python and JavaScript; Python's parser says only what it would have liked instead.
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


# ---- older names and forms ----

# Old names, from the outermost: the same meaning stands at the new path.
_ZERO = "zero_optimization"
_RENAMED = {
    "bfloat16": "bf16",
    "allgather_size": f"{_ZERO}.allgather_bucket_size",
    f"{_ZERO}.stage3_gather_fp16_weights_on_model_save": f"{_ZERO}.stage3_gather_16bit_weights_on_model_save",
    f"{_ZERO}.gather_16bit_weights_on_model_save": f"{_ZERO}.stage3_gather_16bit_weights_on_model_save",
    f"{_ZERO}.prefetch_bucket_size": f"{_ZERO}.stage3_prefetch_bucket_size",
    f"{_ZERO}.param_persistence_threshold": f"{_ZERO}.stage3_param_persistence_threshold",
    f"{_ZERO}.model_persistence_threshold": f"{_ZERO}.stage3_model_persistence_threshold",
    f"{_ZERO}.max_live_parameters": f"{_ZERO}.stage3_max_live_parameters",
    f"{_ZERO}.max_reuse_distance": f"{_ZERO}.stage3_max_reuse_distance",
    f"{_ZERO}.allgather_size": f"{_ZERO}.allgather_bucket_size",
    f"{_ZERO}.aio": "aio",  # where the documentation of Transformers writes it
}


def modernize(raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A copy of ``raw`` with present names, and old path -> new path of what was renamed.

    Raises ConfigError where the old and the new name are both given and disagree.
    """
    # Copies as far as something is renamed: the user's dict stays as it was given, clients read it again.
    config, names = dict(raw), dict[str, str]()
    if config.pop("fp32_allreduce", False) is True:
        _put(config, "communication_data_type", "fp32", "fp32_allreduce", names)
    zero = config.get(_ZERO)
    if isinstance(zero, bool):
        # The first form of the section was a switch for what is now stage 1.
        names[f"{_ZERO}: {str(zero).lower()}"] = f"{_ZERO}.stage"
        zero = {"stage": int(zero)}
    # Where the section is no object, a rename into it has no place; the check of keys says what is wrong there.
    sections = {"": config}
    if isinstance(zero, dict):
        sections[_ZERO] = config[_ZERO] = dict(zero)
    for old, new in _RENAMED.items():
        (section, _, name), target = old.rpartition("."), new.rpartition(".")[0]
        if section in sections and target in sections and name in sections[section]:
            _put(sections[target], new, sections[section].pop(name), old, names)
    if _ZERO in sections:
        _switches(sections[_ZERO], names)
    _clip_once(config, names)
    return config, names


def _clip_once(config: dict[str, Any], names: dict[str, str]) -> None:
    """Take an optimizer's ``max_grad_norm`` for what it says a second time: the engine clips, by the whole norm."""
    optimizer = config.get("optimizer")
    params = optimizer.get("params") if isinstance(optimizer, dict) else None
    if not isinstance(optimizer, dict) or not isinstance(params, dict) or "max_grad_norm" not in params:
        return
    if params["max_grad_norm"] == config.get("gradient_clipping"):
        rest = {name: value for name, value in params.items() if name != "max_grad_norm"}
        config["optimizer"] = {**optimizer, "params": rest}
        names["optimizer.params.max_grad_norm"] = "gradient_clipping"


def _switches(zero: dict[str, Any], names: dict[str, str]) -> None:
    """``"cpu_offload": true`` and its like, from before offloading had sections."""
    pin = zero.pop("cpu_offload_use_pin_memory", None)
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        value, path = zero.pop(old, None), f"{_ZERO}.{old}"
        if value in (None, "auto", False, 0, "false"):
            continue
        if value not in (True, 1, "true"):
            raise ConfigError(
                f"config key {path!r}", expected="true or false", found=repr(value), fix="write true or false"
            )
        zero[new] = dict(zero.get(new) or {})
        _put(zero[new], f"{_ZERO}.{new}.device", "cpu", path, names)
        if pin is not None:
            zero[new].setdefault("pin_memory", pin)
            names[f"{_ZERO}.cpu_offload_use_pin_memory"] = f"{_ZERO}.{new}.pin_memory"


def _put(target: dict[str, Any], new: str, value: Any, old: str, names: dict[str, str]) -> None:
    name = new.rpartition(".")[2]
    # An unset value, or a device of "none", does not disagree with the old name.
    free = (value, "auto", None, "none") if name == "device" else (value, "auto", None)
    if name in target and target[name] not in free:
        raise ConfigError(
            f"config key {old!r} is the old name of {new!r}, and both are given",
            found=f"{value!r} and {target[name]!r}",
            fix=f"keep {new!r} and remove {old!r}",
        )
    target[name] = value
    names[old] = new
