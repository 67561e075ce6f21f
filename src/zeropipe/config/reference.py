"""Writes the configuration reference and the JSON schema for editors, both from the schema itself."""

from __future__ import annotations

import json
import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from zeropipe.config.fields import AUTO, every_key, mark_of, section_of
from zeropipe.config.schema import Config

_HEAD = """\
# Configuration reference

<!-- Written by `zeropipe config reference`; change the schema in src/zeropipe/config instead. -->

One JSON file (or a dict) describes a run. Check it with `zeropipe config check my.json --world 8`; point an editor at
`zeropipe config schema` for completion.

- Every key is optional. `"auto"` means unset; the software between you and zeropipe may fill it in.
- Inside a section an unknown key is an error that names the nearest known one. At the top level a near miss is an
  error, and any other unknown key is passed over with one line.
- Whole numbers may be written as `5e8`.
- Of `train_batch_size`, `train_micro_batch_size_per_gpu` and `gradient_accumulation_steps` give any two, or one
  (no accumulation). `train_batch_size` = micro batch x accumulation x data-parallel ranks.
- A key marked *no effect* is accepted for configurations that have it, and changes no result. A key marked *not
  offered* is an error when it is used, because results would differ.
"""


def markdown() -> str:
    """The whole reference: one table for the top level and one for each section."""
    parts = [_HEAD, "\n## Top level\n", _table(Config, "")]
    for path, _, section in every_key(Config):
        if section is not None:
            about = (section.__doc__ or "").strip().splitlines()[0]
            parts += [f"\n## `{path}`\n", f"{about}\n", _table(section, path)]
    return "\n".join(parts) + "\n"


def _table(model: type[BaseModel], path: str) -> str:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, info in model.model_fields.items():
        child = section_of(model, name)
        where = f"{path}.{name}" if path else name
        kind = f"[section](#{where.replace('.', '')})" if child else type_name(info)
        default = "" if child else f"`{json.dumps(info.default)}`"
        rows.append(f"| `{name}` | {kind} | {default} | {_meaning(info)} |")
    return "\n".join(rows)


def _meaning(info: FieldInfo) -> str:
    text, mark = info.description or "", mark_of(info.metadata)
    if mark is None:
        return text
    word, way = ("No effect", "") if mark.fix is None else ("Not offered", f"; {mark.fix}")
    return f"{text} *{word}:* {mark.why}{way}.".lstrip()


def type_name(info: FieldInfo) -> str:
    """The JSON type of a key, with its limits, in words."""
    # pydantic keeps limits among the metadata, each as an object with an attribute of that name.
    name = _type_name(info.annotation)
    limits = []
    for item in info.metadata:
        for attribute, sign in (("gt", ">"), ("ge", ">="), ("le", "<=")):
            limit = getattr(item, attribute, None)
            if limit is not None:
                limits.append(f"{sign} {limit}")
    return f"{name} {', '.join(limits)}" if limits else name


def _type_name(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else _type_name(arg) for arg in args)
    if args and origin not in (list, dict):  # Annotated inside a union
        return _type_name(args[0])
    names = {
        bool: "true/false",
        int: "whole number",
        float: "number",
        str: "string",
        list: "list",
        dict: "object",
    }
    return names.get(origin or annotation, "any")


def json_schema() -> dict[str, Any]:
    """A JSON schema (draft 2020-12) of the configuration, in which every value may also be "auto"."""
    schema = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "zeropipe configuration"
    schema["additionalProperties"] = True
    # An editor must not mark what other software fills in.
    for part in (schema, *schema.get("$defs", {}).values()):
        for name, value in part.get("properties", {}).items():
            shared = {word: value.pop(word) for word in ("default", "description", "title") if word in value}
            part["properties"][name] = {"anyOf": [value, {"const": AUTO}], **shared}
    schema["properties"]["$schema"] = {"type": "string"}
    return schema
