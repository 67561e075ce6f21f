"""The laws of the design hold for every file of the package.

An exception is listed with its reason; one that is no longer needed fails too, so the lists stay true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch

import pytest

from tests.architecture import rules, structure
from tests.architecture.rules import File, Violation
from tests.architecture.structure import Found
from tests.architecture.walk import returns, walk

Rule = Callable[[File], Iterator[Violation]]
TreeRule = Callable[[Sequence[File]], Iterator[Found]]


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
    added_to = "PipelineEngine._INSTRUCTION_MAP, to which users of DeepSpeed add instructions of their own"
    check(files, rules.global_state, {"runtime/pipe/stepwise/run.py": added_to})


def test_no_class_keeps_state_for_all_its_objects(files: list[File]) -> None:
    check(files, rules.class_state, {})


def test_only_zero_init_patches_torch(files: list[File]) -> None:
    allowed = {}
    if any(file.path == "runtime/zero/gather/init.py" for file in files):
        allowed["runtime/zero/gather/init.py"] = "zero.Init must see every module's construction; restores it"
    if any(file.path == "planning/ledger.py" for file in files):
        allowed["planning/ledger.py"] = "a rehearsal must see memory that no operator asks for; restores it"
        allowed["planning/here.py"] = "a rehearsed program is told of GPUs that are not there; restores it"
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


def test_no_bare_except(files: list[File]) -> None:
    check(files, rules.bare_except, {})


def test_the_library_does_not_print(files: list[File]) -> None:
    check([file for file in files if not file.path.startswith("cli/")], rules.prints, {})


def test_nothing_is_left_unfinished(files: list[File]) -> None:
    check(files, rules.unfinished, {})


def test_public_arguments_have_types(files: list[File]) -> None:
    """``Any`` says nothing, not even that nothing can be said: that has a name in ``given.py``, with the reason."""
    later = "its room was being rebuilt when the law came"
    allowed = {
        "runtime/zero/gather/hooks.py": later,
        "runtime/zero/gather/shards.py": later,
        "runtime/zero/gather/unit_hooks.py": later,
    }
    check(files, rules.takes_anything, allowed)


# ---- structure ----


def check_tree(files: list[File], rule: TreeRule, allowed: Mapping[str, str]) -> None:
    """As ``check``, for a rule that needs all files at once."""
    found = list(rule(files))
    used = {pattern for pattern in allowed for path, _, _ in found if fnmatch(path, pattern)}
    broken = [
        f"src/zeropipe/{path}:{line}: {what}"
        for path, line, what in found
        if not any(fnmatch(path, pattern) for pattern in allowed)
    ]
    broken += [f"the exception for {pattern} is no longer needed" for pattern in allowed.keys() - used]
    assert not broken, "\n" + "\n".join(broken)


def test_imports_never_lead_back(files: list[File]) -> None:
    """Those under TYPE_CHECKING and inside functions count: a file is understood with what it names."""
    check_tree(files, structure.goes_in_a_circle, {})


def test_what_is_imported_is_there(files: list[File]) -> None:
    """Also inside functions, where neither a start nor the type checker would find out."""
    check_tree(files, structure.imports_what_is_not_there, {})


def test_modules_are_named_in_strings_in_one_table(files: list[File]) -> None:
    allowed = {
        "names.py": "the table",
        "compat/table.py": "the same for the name deepspeed",
        "runtime/zero/gather/init.py": "asks the table for what other libraries exchange under a name of theirs",
    }
    check_tree(files, structure.names_a_module_in_a_string, allowed)


def test_no_class_is_wide(files: list[File]) -> None:
    check_tree(files, structure.is_wide, {})


def test_no_class_writes_anothers_attributes(files: list[File]) -> None:
    setters = "set once, when the parts of a model are put together"
    allowed = {
        "cli/main.py": "an attribute of typer's command",
        "runtime/pipe/engine.py": "the configuration's value for a module that says nothing",
        "runtime/zero/gather/hooks.py": setters,
        "runtime/zero/gather/sharded_model.py": setters,
        "runtime/zero/gather/state_dict.py": "a module's values change hands between two builders",
        "runtime/zero/hold/optimizer.py": "param groups that users set are those of torch's optimizer",
        "runtime/zero/param.py": "the record that a parameter carries",
    }
    check_tree(files, structure.writes_anothers_attribute, allowed)


def test_only_parsers_ask_for_kinds(files: list[File]) -> None:
    allowed = {"compat/optimizers.py": "scripts ask isinstance of an optimizer: these classes answer"}
    check_tree(files, structure.asks_for_our_class, allowed)


def test_nothing_is_cast(files: list[File]) -> None:
    allowed = {
        "checkpoint/export.py": "torch.save types its output more narrowly than it is",
    }
    check_tree(files, structure.casts, allowed)


def test_folders_are_short(files: list[File]) -> None:
    check_tree(files, structure.is_full, {})


@pytest.mark.process
def test_the_way_from_initialize_to_the_engine_is_short() -> None:
    """One list of steps, in which no file is gone back to for a decision that belongs with another."""
    way = walk()
    told = "\n".join(f"{stop.path}: {', '.join(stop.functions)}" for stop in way)
    assert way[-1].path == "runtime/engine/engine.py", told
    assert len(way) <= 20 and returns(way) <= 5, f"{len(way)} stops, {returns(way)} returns\n{told}"
