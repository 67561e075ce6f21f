"""Turns pydantic's validation errors into ours: the key as a dotted path, expected, found, and the way out."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from zeropipe.config.keys import section_of
from zeropipe.config.schema import Config
from zeropipe.errors import describe

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
    """One line for each wrong value."""
    return "\n".join(_line(item) for item in error.errors(include_url=False))


def _line(item: Any) -> str:
    names = [str(name) for name in item["loc"]]
    path, value = ".".join(names), item["input"]
    context = {name: _number(limit) for name, limit in item.get("ctx", {}).items()}
    template = _EXPECTED.get(item["type"])
    expected = template.format(**context) if template else item["msg"]
    return describe(
        f"config key {path!r}", expected=expected, found=repr(value), fix=_fix(names, path, value)
    )


def _number(limit: Any) -> Any:
    return f"{limit:g}" if isinstance(limit, float) else limit


def _fix(names: list[str], path: str, value: Any) -> str:
    if path in _HINTS:
        return _HINTS[path]
    info = _field(names)
    if isinstance(value, str) and info is not None and isinstance(info.default, int | float):
        return f"write it without quotes, for example {json.dumps(info.default)}"
    if info is None or isinstance(info.default, BaseModel):
        return "correct the value"
    if info.default is None:
        return "correct the value, or remove the key"
    return f"correct the value, or remove the key (its default is {json.dumps(info.default)})"


def _field(names: list[str]) -> FieldInfo | None:
    model: type[BaseModel] | None = Config
    info = None
    for name in names:
        if model is None or name not in model.model_fields:
            return info
        info = model.model_fields[name]
        model = section_of(model, name)
    return info
