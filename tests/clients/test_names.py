"""The list of names that clients take from deepspeed is whole: their sources, as installed here, ask for no other."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.compat.names import PACKAGE, REFUSED

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
    listed = [f"deepspeed.{name}" for name in (*(entry.name for entry in PACKAGE), *REFUSED)]
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
