"""The list of names that clients take from deepspeed is whole: their sources, as installed here, ask for no other."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.launch import python
from tests.unit.compat.names import OTHERS, PACKAGE

CLIENTS = ("transformers", "accelerate", "peft", "trl", "lightning", "pytorch_lightning", "lightning_fabric")


def sources(client: str) -> Iterator[Path]:
    spec = importlib.util.find_spec(client)
    assert spec is not None and spec.submodule_search_locations
    for folder in spec.submodule_search_locations:
        yield from Path(folder).rglob("*.py")


def asked(tree: ast.AST) -> Iterator[str]:
    """Dotted names below deepspeed that a file imports, or reaches as attributes of what it imports."""
    known = {"deepspeed": "deepspeed"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname and alias.name.split(".")[0] == "deepspeed":
                    known[alias.asname] = alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspeed":
            for alias in () if node.level else node.names:
                yield f"{node.module}.{alias.name}"
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        parts: list[str] = []
        value: ast.AST = node
        while isinstance(value, ast.Attribute):
            parts.append(value.attr)
            value = value.value
        if parts and isinstance(value, ast.Name) and value.id in known:
            yield ".".join([known[value.id], *reversed(parts)])


@pytest.mark.parametrize("client", CLIENTS)
def test_the_list_has_every_name_that_the_client_asks_for(client: str) -> None:
    listed = [f"deepspeed.{name}" for name in (*(entry.name for entry in PACKAGE), *OTHERS)]
    found = set()
    for file in sources(client):
        text = file.read_text(errors="ignore")
        if "deepspeed" in text:
            found |= set(asked(ast.parse(text)))
    missing = {
        name
        for name in found
        # A name may be the way to a listed one, or something asked of it.
        if not any(name == one or name.startswith(f"{one}.") or one.startswith(f"{name}.") for one in listed)
    }
    assert missing == set()
    assert found or client == "lightning"  # its strategies are in the two other packages


GATES = """
from accelerate.utils import compare_versions, is_deepspeed_available
from lightning.fabric.strategies.deepspeed import _DEEPSPEED_AVAILABLE, _DEEPSPEED_GREATER_EQUAL_0_16
from lightning_utilities.core.imports import RequirementCache
from transformers.integrations.deepspeed import is_deepspeed_available as transformers_available
from transformers.utils.versions import require_version
from trl.import_utils import is_deepspeed_available as trl_available

assert is_deepspeed_available() and transformers_available() and trl_available() and _DEEPSPEED_AVAILABLE
assert _DEEPSPEED_GREATER_EQUAL_0_16
for version in ("0.3.1", "0.5.5", "0.9.3", "0.11.0", "0.14.0", "0.14.4", "0.14.5", "0.16.4", "0.18.2", "0.19.6"):
    assert compare_versions("deepspeed", ">=", version), version
    require_version(f"deepspeed>={version}")
assert RequirementCache("deepspeed>=0.16.0") and not RequirementCache("deepspeed<0.6.6")
print("open")
"""


def test_every_check_for_deepspeed_and_its_version_is_open() -> None:
    done = python("-c", GATES, timeout=240)
    assert done.stdout.splitlines()[-1:] == ["open"], done.stderr
