"""The laws of the design hold for every file of the package.

An exception is listed with its reason; one that is no longer needed fails too, so the lists stay true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch

import pytest

from tests.architecture import rules
from tests.architecture.rules import File, Violation

Rule = Callable[[File], Iterator[Violation]]


@pytest.fixture(scope="module")
def files() -> list[File]:
    found = rules.source_files()
    assert len(found) > 10
    return found


def check(files: list[File], rule: Rule, allowed: Mapping[str, str], only: str = "*") -> None:
    """Fail with a list of violations. ``allowed``: path pattern -> reason why the rule does not hold there."""
    broken, used = [], set()
    for file in files:
        if not fnmatch(file.path, only):
            continue
        for line, what in rule(file):
            patterns = [pattern for pattern in allowed if fnmatch(file.path, pattern)]
            used.update(patterns)
            if not patterns:
                broken.append(f"src/zeropipe/{file.path}:{line}: {what}")
    broken += [f"the exception for {pattern} is no longer needed" for pattern in allowed.keys() - used]
    assert not broken, "\n" + "\n".join(broken)


def test_only_comm_names_torch_distributed(files: list[File]) -> None:
    check(
        files,
        lambda file: rules.names(file, "torch.distributed"),
        {"comm/*": "the seam that hides it from everything else"},
    )


def test_nobody_goes_around_the_seam(files: list[File]) -> None:
    check(files, rules.bypasses_the_seam, {})


def test_layout_is_pure_integers(files: list[File]) -> None:
    banned = ("torch", "numpy", "zeropipe.comm", "zeropipe.config", "zeropipe.tensor", "zeropipe.runtime")
    check(files, lambda file: rules.names(file, *banned), {}, only="layout/*")


def test_config_needs_no_processes(files: list[File]) -> None:
    banned = ("torch.distributed", "zeropipe.comm", "zeropipe.tensor", "zeropipe.runtime")
    check(files, lambda file: rules.names(file, *banned), {}, only="config/*")


def test_state_lives_in_objects(files: list[File]) -> None:
    check(files, rules.global_state, {})


def test_no_class_keeps_state_for_all_its_objects(files: list[File]) -> None:
    check(files, rules.class_state, {})


def test_only_module_patch_patches_torch(files: list[File]) -> None:
    allowed = {}
    if any(file.path == "runtime/zero/gather/module_patch.py" for file in files):
        allowed["runtime/zero/gather/module_patch.py"] = (
            "zero.Init must see every module's construction; restores it"
        )
    check(files, rules.patches_torch, allowed)


def test_only_flat_computes_padding(files: list[File]) -> None:
    check(
        files,
        rules.computes_padding,
        {
            "layout/flat.py": "the owner",
            "comm/*": "the next peer of a ring is a remainder",
            "config/batch.py": "counts samples of a batch",
            "runtime/dataloader.py": "counts batches of a data set",
            "runtime/pipe/*": "counts micro-batches and columns of a drawing",
            "tensor/signs.py": "eight signs are one byte",
        },
    )


def test_every_file_opens_with_its_reason(files: list[File]) -> None:
    check(files, rules.lacks_docstring, {})


def test_files_are_short(files: list[File]) -> None:
    check(files, rules.too_long, {})


def test_classes_are_small(files: list[File]) -> None:
    check(files, rules.too_many_methods, {})


def test_no_bare_except(files: list[File]) -> None:
    check(files, rules.bare_except, {})


def test_the_library_does_not_print(files: list[File]) -> None:
    check([file for file in files if not file.path.startswith("cli/")], rules.prints, {})


def test_nothing_is_left_unfinished(files: list[File]) -> None:
    check(files, rules.unfinished, {})
