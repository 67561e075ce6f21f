"""Says what is wrong with a key or its value: which key was meant, what was expected, and the way out."""

from __future__ import annotations

import difflib
import json
from typing import Any

from pydantic import BaseModel, ValidationError

from zeropipe.config.fields import AUTO, every_key, section_of
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


# Keys, before validation.


def check_keys(
    config: dict[str, Any], lenient: bool = False
) -> tuple[dict[str, Any], dict[str, str], frozenset[str]]:
    """What of ``config`` has a value of its own, the foreign keys, and the paths of those that are "auto".

    Foreign keys come with what was probably meant, or "". Raises ConfigError on an unknown key inside a section, and
    on a top-level key that was meant to be a known one, unless ``lenient``: then these are foreign, too.
    """
    known, foreign, auto = dict[str, Any](), dict[str, str](), set[str]()
    for name, value in config.items():
        if name in Config.model_fields:
            known[name] = value
        elif not isinstance(name, str):
            raise ConfigError(
                f"config key {name!r}", expected="a string", found=type(name).__name__, fix="quote it"
            )
        elif name not in _SILENT and not name.startswith("#"):
            meant = _meant_by(name)
            if meant is not None and not lenient:
                raise ConfigError(
                    f"unknown config key {name!r} (value {value!r}) looks like {meant[0]!r}", fix=meant[1]
                )
            foreign[name] = "" if meant is None else meant[0]
    return _set(Config, known, "", auto, foreign if lenient else None), foreign, frozenset(auto)


def _set(
    model: type[BaseModel] | None,
    section: dict[str, Any],
    path: str,
    auto: set[str],
    foreign: dict[str, str] | None,
) -> dict[str, Any]:
    """A copy of ``section`` without "auto" values and null sections. ``model``: None inside a plain value.

    ``foreign``: takes the unknown keys; None: they are errors.
    """
    kept = {}
    for name, value in section.items():
        where = f"{path}.{name}" if path else name
        if model is not None and name not in model.model_fields:
            if str(name).startswith("#"):
                continue
            if foreign is None:
                raise ConfigError(_unknown(model, str(name), value, path))
            near = difflib.get_close_matches(str(name), model.model_fields, n=1, cutoff=_SECTION_CUTOFF)
            foreign[where] = f"{path}.{near[0]}" if near else ""
            continue
        inner = None if model is None else section_of(model, name)
        if isinstance(value, str) and value == AUTO:
            auto.add(where)
        elif isinstance(value, dict):
            kept[name] = _set(inner, value, where, auto, foreign)
        elif inner is not None and value is not None:
            raise ConfigError(
                f"config key {where!r} is a section",
                expected="an object {...}",
                found=repr(value),
                fix=f'write "{name}": {{{_main_key(inner, value)}}}',
            )
        # JSON's null leaves a section, and a dict of arguments, to their defaults; of other keys it is a value.
        elif (
            value is not None
            or model is None
            or not isinstance(model.model_fields[name].default, dict | BaseModel)
        ):
            kept[name] = value
    return kept


def _meant_by(name: str) -> tuple[str, str] | None:
    """The known key that a foreign top-level one was probably meant to be, and how to mend it."""
    if "." in name:
        return None  # a client's own flattened copy of a nested key; reported as foreign
    plain = name.lower().replace("-", "_")
    close = difflib.get_close_matches(plain, Config.model_fields, n=1, cutoff=_TOP_LEVEL_CUTOFF)
    meant = plain if plain in Config.model_fields else _MEANT.get(plain) or (close[0] if close else None)
    # A key of another program, or one that was meant to stand in a section, where at the top level it does nothing.
    if meant is not None:
        return meant, f"rename it to {meant!r}, or remove it"
    owners = _owners(plain)
    owner = next((section for section in _OFTEN_MISPLACED if section in owners), None)
    if owner is None:
        return None
    return f"{owner}.{plain}", f'put it inside its section: "{owner}": {{"{plain}": ...}}'


def _main_key(model: type[BaseModel], value: Any) -> str:
    name = next((n for n in ("enabled", "stage", "device", "type") if n in model.model_fields), None)
    if name is None:
        return "..."
    shown = json.dumps(value) if isinstance(value, bool) else f'"{value}"'
    return f'"{name}": {value if name == "stage" and isinstance(value, int) else shown}'


def _unknown(model: type[BaseModel], name: str, value: Any, path: str) -> str:
    plain = name.lower().replace("-", "_")
    close = difflib.get_close_matches(plain, model.model_fields, n=1, cutoff=_SECTION_CUTOFF)
    owner = next((where for where in _owners(plain) if where != path), None)
    what = f"unknown config key {f'{path}.{name}'!r} (value {value!r})"
    # The likeliest slip first: letters, then an argument beside params, then the wrong section, then a near name.
    if plain in model.model_fields:
        return describe(what, fix=f"write it as {plain!r}")
    if "params" in model.model_fields and not (
        close and difflib.SequenceMatcher(a=plain, b=close[0]).ratio() > _TOP_LEVEL_CUTOFF
    ):
        return describe(what, fix=f'arguments go inside "{path}": {{"params": {{"{name}": ...}}}}')
    if owner is not None:
        return describe(what, fix=f"{name!r} belongs in {owner or 'the top level'!r}; move it there")
    if close:
        return describe(f"{what}; the nearest known key is {close[0]!r}", fix=f"rename it to {close[0]!r}")
    return describe(what, expected=f"one of {', '.join(sorted(model.model_fields))}", fix="remove it")


def _owners(name: str) -> list[str]:
    """The sections that have a key of this name, the outer ones first; "" is the top level."""
    # Every other section has one of these, so they say nothing.
    if name in ("enabled", "type", "params"):
        return []
    paths = (path.rpartition(".") for path, _, _ in every_key(Config))
    return sorted(
        (section for section, _, last in paths if last == name), key=lambda s: (s != "", s.count("."))
    )


# Values, as pydantic found them.

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string",
    "dict_type": "an object {{...}}",
    "list_type": "a list [...]",
    "finite_number": "a finite number",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than_equal": "a number of at most {le}",
    "literal_error": "{expected}",
    "value_error": "{error}",
}
_BATCH_HINT = "write a whole number such as 8, or remove the key to have it solved from the others"
_HINTS = {
    "train_batch_size": _BATCH_HINT,
    "train_micro_batch_size_per_gpu": _BATCH_HINT,
    "gradient_accumulation_steps": _BATCH_HINT,
    "gradient_clipping": "write 0.0 to turn clipping off",
    "steps_per_print": "write Infinity, or remove the key, to print nothing",
    "zero_optimization.stage": "write 0, 1, 2 or 3",
}


def explain(error: ValidationError) -> str:
    """One line for each wrong value: the key as a dotted path, expected, found, and the way out."""
    return "\n".join(_line(item) for item in error.errors(include_url=False))


def _line(item: Any) -> str:
    names = [str(name) for name in item["loc"]]
    path, value = ".".join(names), item["input"]
    limits = {n: f"{v:g}" if isinstance(v, float) else v for n, v in item.get("ctx", {}).items()}
    template = _EXPECTED.get(item["type"])
    expected = template.format(**limits) if template else item["msg"]
    fix = _HINTS.get(path) or _fix(names, value)
    return describe(f"config key {path!r}", expected=expected, found=repr(value), fix=fix)


def _fix(names: list[str], value: Any) -> str:
    # As far down the path as it is keys: below a plain value, ``optimizer.params`` for one, nothing has a default.
    known = {path: info for path, info, _ in every_key(Config)}
    paths = (".".join(names[:length]) for length in range(len(names), 0, -1))
    info = next((known[path] for path in paths if path in known), None)
    if isinstance(value, str) and info is not None and isinstance(info.default, int | float):
        return f"write it without quotes, for example {json.dumps(info.default)}"
    if info is None or isinstance(info.default, BaseModel):
        return "correct the value"
    if info.default is None:
        return "correct the value, or remove the key"
    return f"correct the value, or remove the key (its default is {json.dumps(info.default)})"
