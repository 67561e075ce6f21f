"""The schema says one thing in one place, and the reference and the editor schema are made from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from pydantic import BaseModel

from zeropipe.config import reference
from zeropipe.config.fields import every_key, section_of
from zeropipe.config.schema import Config

DOCS = Path(__file__).parents[3] / "docs" / "configuration.md"


def models(model: type[BaseModel] = Config) -> list[type[BaseModel]]:
    children = [section_of(model, name) for name in model.model_fields]
    return [model, *(below for child in children if child for below in models(child))]


def test_the_reference_in_docs_is_up_to_date() -> None:
    assert DOCS.read_text(encoding="utf-8") == reference.markdown(), (
        "run: zeropipe config reference -o docs/configuration.md"
    )


def test_every_key_is_described() -> None:
    text = reference.markdown()
    for model in models():
        assert model.__doc__
        for name, info in model.model_fields.items():
            assert info.description, f"{model.__name__}.{name}"
            assert f"| `{name}` |" in text


def test_every_default_is_valid_itself() -> None:
    for model in models():
        assert model.model_validate(model().model_dump()) == model()


def test_the_editor_schema_takes_auto_everywhere_and_refuses_unknown_section_keys() -> None:
    schema = json.loads(json.dumps(reference.json_schema()))
    assert schema["additionalProperties"] is True
    zero = schema["$defs"]["ZeroOptimization"]
    assert zero["additionalProperties"] is False
    for part in (schema, *schema["$defs"].values()):
        for name, value in part.get("properties", {}).items():
            assert name == "$schema" or {"const": "auto"} in value["anyOf"]
    assert zero["properties"]["stage"]["anyOf"][0] == {"maximum": 3, "minimum": 0, "type": "integer"}


def test_parsing_needs_no_torch() -> None:
    code = "import sys, zeropipe.config.parse as p; p.parse_config({}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_key_is_walked_once_and_is_what_settings_tell() -> None:
    keys = [path for path, _, section in every_key(Config) if section is None]
    assert len(keys) == len(set(keys))
    told = Config().settings()
    # A dict of arguments is told argument by argument, and has none here.
    assert set(told) == set(keys)


def test_sections_are_walked_before_what_is_in_them() -> None:
    seen: set[str] = {""}
    for path, _, section in every_key(Config):
        assert path.rpartition(".")[0] in seen
        if section is not None:
            seen.add(path)
