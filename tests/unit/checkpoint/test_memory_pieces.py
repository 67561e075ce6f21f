"""A piece in memory that is not to the byte what was written is found, whatever happened to it."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from zeropipe.checkpoint.memory import shelf as shelves
from zeropipe.checkpoint.memory.pieces import Digest, Seal, Slot, fault_of, opened, pack, seal_of, unpack
from zeropipe.checkpoint.memory.shelf import Shelf, command
from zeropipe.checkpoint.save.contents import Outgoing
from zeropipe.checkpoint.save.records import Manifest
from zeropipe.errors import CheckpointError, UsageError

PART = Manifest("global_step7", 1, "float32", "AdamW", 1, {"dp": 1}, 7, {}, (), {}, (), (), (), ())


def written(path: Path, trees: dict[str, Any]) -> Seal:
    packed = pack(Outgoing(trees, PART))
    slot = Slot(path)
    memory = slot.begin(packed.nbytes)
    packed.begin(memory, lambda tensor: tensor.numel() % 2 == 0)
    digest = packed.finish(memory, lambda tensor: tensor.numel() % 2 == 1)
    assert digest == Digest.of(memory)
    seal = Seal(1, "a" * 12, 3, 7, 0, 1, "agent", packed.nbytes, digest)
    slot.end(seal)
    return seal


def some() -> dict[str, Any]:
    return {"file": {"weights": torch.arange(50.0), "step": torch.tensor(3.0), "words": ["plain", 1, None]}}


def test_what_was_packed_comes_back(tmp_path: Path) -> None:
    shared = torch.randn(3, 4, dtype=torch.bfloat16)
    trees = {
        "a": {
            "odd": torch.randn(4, 6).t()[1:],
            "empty": torch.empty(0, 5),
            "bool": torch.tensor([True, False]),
            "complex": torch.randn(2, dtype=torch.complex64),
            "sparse": torch.eye(3).to_sparse(),
            "parameter": torch.nn.Parameter(torch.ones(2)),
            "long": torch.arange(3),
            **{f"large {n}": torch.randn(n) for n in (2**18 - 3, 2**18, 2**18 + 1, 3 * 2**18 + 5, 7)},
            "twice": (shared, shared),
        }
    }
    seal = written(tmp_path / "piece", trees)
    assert seal_of(tmp_path / "piece") == seal and fault_of(tmp_path / "piece", seal) == ""
    part, back = unpack(opened(tmp_path / "piece", seal.nbytes))
    assert part == PART
    found = back["a"]
    assert found["twice"][0] is found["twice"][1]
    assert isinstance(found["parameter"], torch.nn.Parameter)
    for name, value in trees["a"].items():
        if name == "twice":
            assert torch.equal(found[name][0], shared)
        elif name == "sparse":
            assert torch.equal(found[name].to_dense(), torch.eye(3))
        else:
            assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "piece"
    seal = written(path, some())
    whole = path.read_bytes()
    used = whole[:4096].rstrip(b"\0")
    places = [*range(len(used)), *range(4096, len(whole))]
    with open(path, "r+b", buffering=0) as file:
        for at in places:
            os.pwrite(file.fileno(), bytes([whole[at] ^ (1 + at % 255)]), at)
            assert fault_of(path, seal), at
            os.pwrite(file.fileno(), whole[at : at + 1], at)
    assert fault_of(path, seal) == ""


def test_what_changed_places_is_found() -> None:
    """Of two words, two rows, two pages: sums alone would not change."""
    generator = random.Random(0)
    memory = torch.randint(0, 255, (3 * 2**20 + 4093,), dtype=torch.uint8)
    wanted = Digest.of(memory)
    for width in (1, 8, 64, 4096, 8192, 2**20):
        for _ in range(15):
            first, second = generator.sample(range(len(memory) // width), 2)
            other = memory.clone()
            a, b = (slice(at * width, (at + 1) * width) for at in (first, second))
            other[a], other[b] = memory[b], memory[a]
            assert torch.equal(other, memory) or Digest.of(other) != wanted, (width, first, second)
    assert Digest.of(memory[:-1]) != wanted and Digest.of(torch.cat([memory, memory[:1] * 0])) != wanted


def test_truncated_missing_and_other_pieces_are_found(tmp_path: Path) -> None:
    path = tmp_path / "piece"
    seal = written(path, some())
    whole = path.read_bytes()
    for length in (0, 10, 4095, 4096, 4500, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert fault_of(path, seal)
    path.unlink()
    assert fault_of(path, seal)
    other = written(path, {"file": {"weights": torch.ones(50)}})
    assert other != seal and fault_of(path, seal)
    with pytest.raises(CheckpointError, match="truncated"):
        opened(path, 10**6)


def test_what_was_begun_and_not_ended_is_no_piece(tmp_path: Path) -> None:
    slot = Slot(tmp_path / "piece")
    for nbytes in (100, 100, 5000):  # in the same memory, and in a larger file
        slot.begin(nbytes)
        assert seal_of(slot.path) is None
        slot.end(Seal(1, "a" * 12, 3, 7, 0, 1, "agent", nbytes, ""))
        assert seal_of(slot.path) is not None


# Where they lie.


def test_nobody_else_can_open_them_and_the_last_rank_takes_them_away(tmp_path: Path) -> None:
    ranks = [Shelf(tmp_path, 0) for _ in range(2)]
    for rank, shelf in enumerate(ranks):
        shelf.open()
        assert shelf.folder == ranks[0].folder and shelf.folder.stat().st_mode & 0o777 == 0o700
        slot = shelf.slot("a" * 12, rank, 0)
        slot.begin(100)
        assert slot.path.stat().st_mode & 0o777 == 0o600
    ranks[0].end("a" * 12, 0, 2)
    assert ranks[0].folder.exists()
    ranks[1].end("a" * 12, 1, 2)
    assert not list(tmp_path.iterdir())


def test_a_last_life_of_one_copy_leaves_nothing_of_those_before(tmp_path: Path) -> None:
    """What they had made is kept until every rank has a copy of this life, and was left where that had only one."""
    shelf, ranks = Shelf(tmp_path, 0), range(2)
    shelf.open()
    for token in ("a" * 12, "b" * 12):
        for rank in ranks:
            shelf.slot(token, rank, 0).begin(100)
    shelf.end("a" * 12, 0, 2)  # the other one died at its end
    for rank in ranks:
        assert len(list(shelf.folder.iterdir())) > 4
        shelf.end("b" * 12, rank, 2)
    assert not list(tmp_path.iterdir())


def test_a_new_run_removes_what_is_provably_left_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "before")
    dead = Shelf(tmp_path, 0)
    dead.agent = f"{shelves._boot()} {os.readlink('/proc/self/ns/pid')} 999999999 1"
    dead.open()
    dead.slot("a" * 12, 0, 0).begin(100)
    (dead.folder / "mine.txt").write_text("of the user")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "beside")
    alive = Shelf(tmp_path, 0)
    alive.open()
    kept = alive.slot("b" * 12, 0, 0)
    kept.begin(100)
    foreign = tmp_path / f"zeropipe-{os.geteuid() + 1}-{'0' * 16}"
    foreign.mkdir()
    (tmp_path / f"zeropipe-{os.geteuid()}-{'1' * 16}").symlink_to(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "now")
    Shelf(tmp_path, 0).open()
    assert [path.name for path in dead.folder.iterdir()] == ["mine.txt"]
    assert kept.path.exists() and foreign.exists()
    assert len(list(tmp_path.iterdir())) == 5


def test_runs_that_one_shell_starts_are_told_apart_by_what_it_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep went on from the copies of the run before it, which was killed."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    asked = []
    for words in (["train.py", "a"], ["train.py", "b"], ["train.py", "b"]):
        monkeypatch.setattr("sys.argv", words)
        asked.append(command())
    killed, other, same = (Shelf(tmp_path, 0, words) for words in asked)
    assert other.folder == same.folder != killed.folder
    pid = os.fork()
    if pid == 0:
        killed.agent = other.agent  # the parent's, as a shell's child has it
        killed.open()
        killed.slot("a" * 12, 0, 0).begin(100)
        os._exit(0)
    os.waitpid(pid, 0)
    assert killed.folder.exists()
    other.open()  # takes away what is left, and no folder of a run that lives
    other.slot("b" * 12, 0, 0).begin(100)
    assert not killed.folder.exists()
    Shelf(tmp_path, 0, "third").open()
    assert other.folder.exists()


def test_a_folder_that_others_can_open_is_refused(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 0)
    shelf.folder.mkdir(mode=0o755)
    with pytest.raises(UsageError, match="nobody else"):
        shelf.open()
    assert shelf.found() == []
    with pytest.raises(UsageError, match="a folder that can be written"):
        Shelf(tmp_path / "absent", 0).open()


def test_engines_have_folders_files_of_their_own(tmp_path: Path) -> None:
    first, second = Shelf(tmp_path, 0), Shelf(tmp_path, 1)
    first.open()
    second.open()
    for shelf in (first, second):
        slot = shelf.slot("a" * 12, 0, 0)
        slot.begin(10)
        slot.end(Seal(1, "a" * 12, 1, 1, 0, 1, shelf.agent, 10, ""))
    assert len(first.found()) == len(second.found()) == 1
    first.keep_only("b" * 12)
    assert not first.found() and second.found()
