"""The pages keep their word: links lead somewhere, code is code, commands and the tests that are named exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.helpers.pages import PAGES, blocks
from zeropipe.cli.main import app
from zeropipe.config.parse import parse_config

ROOT = Path(__file__).parents[3]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
NAMED_TEST = re.compile(r"`(?:tests/)?([\w/]+\.py)::(test_\w+)`")
TARGETS = frozenset(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors of a page's headings, as Git hosts make them."""
    prose = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles)
    return frozenset(re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in plain)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(CODE.sub("", page.read_text("utf-8"))):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        found = target.exists() and (ROOT in target.parents or target == ROOT)
        if not found or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_code(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            ast.parse(block.text)
        elif block.language == "json":
            whole = block.text if block.text.startswith("{") else f"{{{block.text}}}"
            parse_config(json.loads(whole))
        elif block.language == "":
            for command in commands(block.text):
                check_command(command)


def commands(text: str) -> Iterator[list[str]]:
    """The command lines of ours in a block without a language: after ``$``, or where all lines are commands."""
    for line in text.splitlines():
        words = line.removeprefix("$ ").split("   ")[0].split("  # ")[0]
        if words.startswith(("zeropipe ", "make ", "python -m ", "torchrun ")):
            yield shlex.split(words)


def check_command(words: list[str]) -> None:
    if words[0] == "make":
        assert set(words[1:]) <= TARGETS, words
    elif words[0] == "zeropipe":
        check_cli(typer.main.get_command(app), words)
    elif words[1] == "-m" and words[2].startswith("benchmarks"):
        assert find_spec(words[2]) is not None, words


def check_cli(command: Any, words: list[str]) -> None:
    """The subcommand and its options exist; nothing is run."""
    rest = words[1:]
    while hasattr(command, "get_command"):
        inner = command.get_command(None, rest[0]) if rest else None
        assert inner is not None, words
        command, rest = inner, rest[1:]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word.split("=")[0] for word in rest if word.startswith("--")} <= known, words


def names_in(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    named = NAMED_TEST.findall(text)
    assert [f"{file}::{test}" for file, test in named if test not in names_in(file)] == []
    assert text.count("::test_") == len(named)


def test_every_fault_has_a_test() -> None:
    """A row of the page on faults without one would be a promise."""
    rows = [
        row.split(" | ")
        for row in (ROOT / "docs" / "faults.md").read_text("utf-8").splitlines()
        if " | " in row
    ]
    faults = [row for row in rows if len(row) == 4 and row[0] != "| fault"]
    assert len(faults) > 30 and all(len(row) in (2, 4) for row in rows)
    assert [row[0] for row in faults if not NAMED_TEST.search(row[3])] == []


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    listed = set(re.findall(r"^([\w-]+)$", index, re.MULTILINE))
    assert listed == {page.stem for page in PAGES if page.parent.name == "docs"} - {"index"}


def test_every_file_that_the_architecture_page_names_is_there() -> None:
    """A walk of which one stop is gone leads nowhere."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    there = [
        f"/{path.relative_to(ROOT).as_posix()}" for path in ROOT.rglob("*.py") if ".venv" not in path.parts
    ]
    named = set(re.findall(r"(?<![\w./*])((?:\w+/)*\w+\.py)\b", text))
    assert len(named) > 30
    missing = [name for name in sorted(named) if not any(path.endswith(f"/{name}") for path in there)]
    assert not missing, missing


def test_every_file_that_a_file_of_the_package_names_is_there() -> None:
    """Docstrings and comments send readers to each other, and files move."""
    there = {path.name for path in (ROOT / "src" / "zeropipe").rglob("*.py")}
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / "src" / "zeropipe").rglob("*.py")
        for name in re.findall(r"(?<![\w.\"'])([a-z_0-9]+\.py)\b(?![\"'])", path.read_text("utf-8"))
        if name not in there
    ]
    assert not missing, missing
