"""A save that fails or is killed never harms what was there, and every rank learns of it."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.checkpointing import make_engine, train
from zeropipe.checkpoint.loader import open_source
from zeropipe.checkpoint.save import files, saver
from zeropipe.checkpoint.save import tags as publishing
from zeropipe.checkpoint.save.tags import choose
from zeropipe.checkpoint.save.verify import FileState, verify
from zeropipe.errors import CheckpointError

KILLS = 4  # in the ordinary run; `make soak` does a hundred


def two_saves(rank: int, world: int, folder: str, stage: int = 1) -> None:
    engine = make_engine(stage)
    for _ in range(2):
        train(engine, 1, rank)
        engine.save_checkpoint(folder)


def load_step(rank: int, world: int, folder: str, stage: int = 1) -> Any:
    engine = make_engine(stage, seed=1)
    lines: list[str] = []
    engine.checkpoints.say = lines.append
    path, _ = engine.load_checkpoint(folder)
    return path and Path(path).name, engine.global_steps, lines, engine.module.wide.weight.sum().item()


# Killed at random.


def save_forever(rank: int, world: int, folder: str, delay: float, asynchronous: bool) -> None:
    """Save again and again; the last rank kills itself after ``delay`` seconds, wherever it is then."""
    engine = make_engine(1)
    engine.save_checkpoint(folder, tag="global_step0")
    if rank == world - 1:
        threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    while True:
        train(engine, 1, rank)
        engine.save_checkpoint(folder, async_save=asynchronous)


def killed_at(pool: Any, folder: Path, delay: float, asynchronous: bool) -> None:
    outcomes = pool(2).run_faulty(save_forever, str(folder), delay, asynchronous, timeout=40.0)
    assert outcomes[1].kind == "died", outcomes
    assert outcomes[0].kind in ("error", "died"), outcomes[0]  # told, not stuck
    choice = choose(folder, None)
    first = choice.candidates[0]
    assert all(finding.good for finding in verify(first.path)), first.path
    source = open_source(folder)
    step = source.train_state(0).global_steps
    reference = {e.name: e.read().sum().item() for e in source.module}
    for name, found_step, _, total in pool(2).run(load_step, str(folder)):
        assert name == f"global_step{step}" and found_step == step
        assert total == pytest.approx(
            reference["wide.weight"], abs=1e-4
        )  # a sum, not the claim: see the matrix


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_kill_at_a_random_moment_leaves_a_whole_checkpoint(pool: Any, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    killed_at(pool, tmp_path, rng.uniform(0.0, 0.4), asynchronous=seed % 2 == 1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_kills(pool: Any, tmp_path: Path) -> None:
    rng = random.Random(0)
    for index in range(100):
        killed_at(pool, tmp_path / str(index), rng.uniform(0.0, 0.5), asynchronous=index % 2 == 1)


# Killed at every step of the commit.


class Killed(BaseException):
    """Stands for a kill: nothing in the code under test may catch it and tidy up."""


@pytest.mark.parametrize("after", range(16))
@pytest.mark.parametrize("same_tag", [False, True])
def test_a_kill_between_any_two_steps_of_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, same_tag: bool
) -> None:
    engine = make_engine(1)
    train(engine, 1, 0)
    engine.save_checkpoint(tmp_path, tag="a")
    old = engine.module.wide.weight.detach().clone()
    train(engine, 1, 0)
    calls = {"left": after}

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if calls["left"] == 0:
                raise Killed
            calls["left"] -= 1
            return function(*args, **kwargs)

        return call

    for module, name in [
        (publishing, "write_text"),
        (publishing, "sync_folder"),
        (publishing, "replace_text"),
    ]:
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    monkeypatch.setattr(publishing.os, "rename", counted(os.rename))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    tag = "a" if same_tag else "b"
    killed = False
    try:
        engine.save_checkpoint(tmp_path, tag=tag)
    except Killed:
        killed = True
    monkeypatch.undo()
    new = engine.module.wide.weight.detach().clone()
    other = make_engine(2, seed=1)
    path, _ = other.load_checkpoint(tmp_path)
    assert path is not None
    found = other.module.wide.weight
    assert torch.equal(found, old) or torch.equal(found, new)
    if not killed:
        assert torch.equal(found, new)
    engine.save_checkpoint(tmp_path, tag=tag)  # what was left does not stand in the way
    other.load_checkpoint(tmp_path, tag=tag)
    assert torch.equal(other.module.wide.weight, new)


# Two ranks that both see that all is written.


def claim_late(rank: int, world: int, folder: str) -> bool:
    """An asynchronous save in which rank 1 claims the right to publish while rank 0 already publishes."""
    engine = make_engine(1)
    marks = Path(folder)
    write_part, claim, publish = saver.replace_text, saver._claim, publishing.commit

    def wait_for(pattern: str, count: int) -> None:
        end = time.monotonic() + 30
        while len(list(marks.glob(pattern))) < count:
            assert time.monotonic() < end, pattern
            time.sleep(0.002)

    def both_parts(path: Path, text: str) -> None:
        write_part(path, text)
        (marks / f"wrote-{rank}").touch()
        wait_for("wrote-*", world)

    def late(*args: Any) -> bool:
        (marks / f"seen-{rank}").touch()
        wait_for("seen-*", world)
        if rank == 1:
            wait_for("publishing", 1)
        mine = claim(*args)
        (marks / f"tried-{rank}").touch()
        return mine

    def slow(*args: Any) -> Path:
        (marks / "publishing").touch()
        wait_for("tried-1", 1)
        return publish(*args)

    saver.replace_text, saver._claim, publishing.commit = both_parts, late, slow
    try:
        engine.save_checkpoint(f"{folder}/saves", tag="a", async_save=True)
        engine.checkpoints.saver.wait()
    finally:
        saver.replace_text, saver._claim, publishing.commit = write_part, claim, publish
    engine.save_checkpoint(f"{folder}/saves", tag="b")
    return True


def test_one_rank_publishes_although_another_claims_while_it_does(pool: Any, tmp_path: Path) -> None:
    """A second claim in that moment succeeded once, found the parts gone and called the save failed."""
    assert pool(2).run(claim_late, str(tmp_path)) == [True, True]
    assert all(finding.good for finding in verify(tmp_path / "saves" / "a"))
    assert not any(p.name.startswith(("claimed", "part_")) for p in (tmp_path / "saves" / "a").iterdir())


# Failures of the disk.


def failing_write(rank: int, world: int, folder: str, where: str, asynchronous: bool) -> list[str]:
    engine = make_engine(1)
    train(engine, 1, rank)
    engine.save_checkpoint(folder)
    texts = []
    original = files.torch.save

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device", "a file")

    if rank == 1 and where == "rank":
        files.torch.save = full
    train(engine, 1, rank)
    publish = publishing.commit
    if rank == 0 and where == "commit":
        saver.tags.commit = full
    try:
        engine.save_checkpoint(folder, async_save=asynchronous)
        if asynchronous:
            engine.checkpoints.saver._join()
            engine.save_checkpoint(folder, tag="next")
    except CheckpointError as error:
        texts.append(str(error))
    files.torch.save = original
    saver.tags.commit = publish
    engine.save_checkpoint(folder, tag="after")
    return texts


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("where", ["rank", "commit"])
def test_a_full_disk_is_an_error_on_every_rank_at_once(
    pool: Any, tmp_path: Path, where: str, asynchronous: bool
) -> None:
    if where == "commit" and asynchronous:
        pytest.skip("which rank commits is not known beforehand")
    ranks = pool(2).run(failing_write, str(tmp_path), where, asynchronous)
    assert ranks[0] == ranks[1] and len(ranks[0]) == 1
    assert "No space left on device" in ranks[0][0]
    assert f"[rank {1 if where == 'rank' else 0}]" in ranks[0][0] and "global_step2" in ranks[0][0]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir() and p.name[0] != ".") == [
        "after",
        "global_step1",
    ]
    assert all(f.good for f in verify(tmp_path / "global_step1"))


def raise_at_step(rank: int, world: int, folder: str) -> list[str]:
    engine = make_engine(0)
    original = files.torch.save

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    files.torch.save = full
    engine.save_checkpoint(folder, async_save=True)
    engine.checkpoints.saver._join()
    files.torch.save = original
    texts = []
    for _ in range(2):
        try:
            train(engine, 1, rank)
            texts.append("")
        except CheckpointError as error:
            texts.append(str(error))
    return texts


def test_an_error_of_the_background_writer_surfaces_at_the_next_step_once(pool: Any, tmp_path: Path) -> None:
    for first, second in pool(1).run(raise_at_step, str(tmp_path)):
        assert "No space left" in first and "background" in first and second == ""


def unwritable(rank: int, world: int, folder: str) -> str:
    engine = make_engine(0)
    try:
        engine.save_checkpoint(f"{folder}/file/inside")
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_folder_that_cannot_be_made_is_named_on_every_rank(pool: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    texts = pool(2).run(unwritable, str(tmp_path))
    assert texts[0] == texts[1] and "inside" in texts[0] and "[rank 0]" in texts[0]


# Damage found by a load.


def try_load(rank: int, world: int, folder: str, tag: str | None, verify: bool = True) -> Any:
    engine = make_engine(2, seed=1)
    before = engine.module.wide.weight.detach().clone()
    lines: list[str] = []
    engine.checkpoints.say = lines.append
    try:
        engine.load_checkpoint(folder, tag, verify=verify)
        return engine.global_steps, lines
    except CheckpointError as error:
        assert torch.equal(before, engine.module.wide.weight)
        return str(error), lines


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    elif how == "truncate":
        path.write_bytes(bytes(data[: len(data) // 2]))
    elif how == "missing":
        path.unlink()
    else:
        torch.save({"module": "something else"}, path)


NAMES = ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt", "zeropipe_manifest.json"]


@pytest.mark.parametrize("how", ["flip", "truncate", "missing", "foreign"])
@pytest.mark.parametrize("name", NAMES)
def test_damage_is_named_and_the_newest_whole_one_is_taken(
    pool: Any, tmp_path: Path, name: str, how: str
) -> None:
    if name.endswith("json") and how in ("missing", "foreign"):
        pytest.skip("without a manifest these are DeepSpeed's files, which carry no checksums")
    pool(2).run(two_saves, str(tmp_path))
    damage(tmp_path / "global_step2" / name, how)
    findings = {f.file: f for f in verify(tmp_path / "global_step2")}
    bad = {FileState.MISSING} if how == "missing" else {FileState.DAMAGED}
    assert {n for n, f in findings.items() if f.state in bad} == {name}
    strict = pool(2).run(try_load, str(tmp_path), "global_step2")
    assert strict[0][0] == strict[1][0] and name in strict[0][0]
    for steps, lines in pool(2).run(try_load, str(tmp_path), None):
        assert steps == 1
        assert any("skipped" in line and name in line for line in lines)


def test_a_damaged_latest_is_said_and_survived(pool: Any, tmp_path: Path) -> None:
    pool(2).run(two_saves, str(tmp_path))
    for content in (b"global_step9", b"\xff\xfe\x00", b"", b"x" * 5000, b"../.."):
        (tmp_path / "latest").write_bytes(content)
        for steps, lines in pool(2).run(try_load, str(tmp_path), None):
            assert steps == 2 and lines
    (tmp_path / "latest").unlink()
    assert pool(2).run(try_load, str(tmp_path), None)[0][0] == 2


def test_when_all_are_damaged_the_error_says_what_was_tried(pool: Any, tmp_path: Path) -> None:
    pool(2).run(two_saves, str(tmp_path))
    for tag in ("global_step1", "global_step2"):
        damage(tmp_path / tag / NAMES[1], "flip")
    text = pool(2).run(try_load, str(tmp_path), None)[1][0]
    assert "global_step1" in text and "global_step2" in text and NAMES[1] in text


def test_a_read_only_checkpoint_loads(pool: Any, tmp_path: Path) -> None:
    pool(2).run(two_saves, str(tmp_path))
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    time.sleep(0.01)
    assert pool(2).run(try_load, str(tmp_path), None)[0][0] == 2
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
