"""docs/from-deepspeed.md claims only what a test shows: every claim names one that exists."""

from __future__ import annotations

import ast
import re
from functools import cache

from tests.helpers.launch import ROOT
from zeropipe.compat.table import VERSION

PAGE = (ROOT / "docs" / "from-deepspeed.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`([\w/]+\.py)::(test_\w+)`")


@cache
def names_in(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_test_that_it_names_exists() -> None:
    named = NAMED.findall(PAGE)
    assert len(named) > 40
    assert [f"{file}::{test}" for file, test in named if test not in names_in(file)] == []
    assert PAGE.count("::test_") == len(named)


def test_every_row_of_claims_names_a_test() -> None:
    for title in ("What is the same", "What is better"):
        section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
        rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
        assert len(rows) > 10
        assert [row for row in rows if not NAMED.search(row)] == []


def test_the_version_is_the_present_one() -> None:
    assert f"`{VERSION}`" in PAGE
