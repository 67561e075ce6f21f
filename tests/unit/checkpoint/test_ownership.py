"""Nothing is removed that is not provably ours, and everything is looked at before the first byte goes."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.helpers.checkpointing import make_engine, train
from tests.helpers.forgery import rewrite_manifest
from zeropipe.checkpoint.convert import convert
from zeropipe.checkpoint.export import export, parse_size
from zeropipe.checkpoint.loader import open_source
from zeropipe.checkpoint.save import files, ownership, tags
from zeropipe.checkpoint.save.verify import FileState, verify
from zeropipe.checkpoint.sources.dcp import write_dcp
from zeropipe.checkpoint.sources.universal import write_universal
from zeropipe.cli.main import app
from zeropipe.comm.dcp import read_chunk, read_index
from zeropipe.errors import CheckpointError
from zeropipe.paths import inside


def cli(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["ckpt", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def engine() -> Any:
    engine = make_engine(1)
    train(engine, 1, 0)
    return engine


@pytest.fixture
def run(engine: Any, tmp_path: Path) -> Path:
    """Three checkpoints, the last one in ``latest``."""
    folder = tmp_path / "run"
    engine.clock.global_steps = 1
    for _ in range(3):
        engine.save_checkpoint(folder)
        engine.clock.global_steps += 1
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Saving a tag again.


def test_what_others_put_into_a_tags_folder_is_kept(engine: Any, tmp_path: Path) -> None:
    """A tokenizer beside the weights was gone after the next save of that tag; only our own files are replaced."""
    engine.save_checkpoint(tmp_path, tag="best")
    (tmp_path / "best/tokenizer.json").write_text("{}")
    (tmp_path / "best/notes").mkdir()
    (tmp_path / "best/notes/a.txt").write_text("x")
    (tmp_path / "best/link").symlink_to("../latest")
    for _ in range(2):
        engine.save_checkpoint(tmp_path, tag="best")
    assert (tmp_path / "best/tokenizer.json").read_text() == "{}"
    assert (tmp_path / "best/notes/a.txt").read_text() == "x"
    assert os.readlink(tmp_path / "best/link") == "../latest"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert {f.file for f in verify(tmp_path / "best") if f.state is FileState.EXTRA} == {
        "tokenizer.json",
        "notes",
        "link",
    }


@pytest.mark.parametrize("what", ["folder", "link", "file", "state files"])
def test_what_stands_under_a_tag_and_is_not_ours_is_set_aside(
    engine: Any, tmp_path: Path, what: str, caplog: Any
) -> None:
    """A folder of texts, a link to another checkpoint, DeepSpeed's files: kept beside the new one, and said."""
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "mp_rank_00_model_states.pt").write_text("theirs")
    place = tmp_path / "run" / "best"
    place.parent.mkdir()
    if what == "link":
        place.symlink_to(other)
    elif what == "file":
        place.write_text("a text")
    else:
        place.mkdir()
        (place / ("a.txt" if what == "folder" else "zero_pp_rank_7_mp_rank_00_optim_states.pt")).write_text(
            "t"
        )
    engine.save_checkpoint(place.parent, tag="best")
    assert (other / "mp_rank_00_model_states.pt").read_text() == "theirs"
    asides = ownership.asides(place)
    if what == "folder":
        assert (place / "a.txt").read_text() == "t" and not asides
    else:
        assert len(asides) == 1 and "is kept" in caplog.text
        assert what != "link" or asides[0].is_symlink()
        assert what != "file" or asides[0].read_text() == "a text"
        assert what != "state files" or tree(asides[0]) == {"zero_pp_rank_7_mp_rank_00_optim_states.pt": b"t"}
    assert engine.load_checkpoint(place.parent)[0] == str(place)
    before = {str(p): p.is_symlink() for p in asides}
    assert cli("prune", place.parent, "--keep", 1).exit_code == 0
    assert {str(p): p.is_symlink() for p in ownership.asides(place)} == before


@pytest.mark.parametrize("how", ["folder", "link"])
def test_a_latest_that_is_no_file_is_refused_before_anything_is_written(
    engine: Any, tmp_path: Path, how: str
) -> None:
    """``latest`` as a link to a tag, as other programs make it: it was replaced, or the save failed at its end."""
    (tmp_path / "mine").mkdir()
    if how == "link":
        (tmp_path / "latest").symlink_to("mine")
    else:
        (tmp_path / "latest").mkdir()
    with pytest.raises(CheckpointError, match="latest"):
        engine.save_checkpoint(tmp_path, tag="a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "mine"]
    engine.save_checkpoint(tmp_path, tag="a", save_latest=False)


def test_a_script_of_somebody_else_stays(engine: Any, tmp_path: Path) -> None:
    (tmp_path / "zero_to_fp32.py").write_text("theirs")
    engine.save_checkpoint(tmp_path, tag="a")
    assert (tmp_path / "zero_to_fp32.py").read_text() == "theirs"


@pytest.mark.parametrize(
    "tag", ["latest_universal", "zero_to_fp32.py", " a", "a\n", "a\x1bb", "x" * 201, "..", "a/b", "a\\b"]
)
def test_tags_that_could_not_be_found_again_are_refused(engine: Any, tmp_path: Path, tag: str) -> None:
    with pytest.raises(CheckpointError, match="tag cannot be used"):
        engine.save_checkpoint(tmp_path, tag=tag)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tag", ["zero", "zeropipe_manifest.json", "mp_rank_00_model_states.pt", "a b", "-x"])
def test_no_tag_makes_the_folder_unloadable(engine: Any, tmp_path: Path, tag: str) -> None:
    """A tag called ``zero`` made the whole folder look like a universal checkpoint."""
    engine.save_checkpoint(tmp_path, tag="first")
    engine.save_checkpoint(tmp_path, tag=tag)
    assert engine.load_checkpoint(tmp_path)[0] == str(tmp_path / tag)


# Folders being written.


def test_only_what_nobody_writes_any_more_is_left_over(tmp_path: Path) -> None:
    """Cleaning up while another process saves took its files away, and its training ended."""
    work, hold = ownership.begin(tmp_path / "a")
    (work / "x_states.pt").write_text("x")
    other = ownership.writing(work)
    hold.release()
    assert ownership.leftovers(tmp_path) == []  # another rank still writes
    other.release()
    assert ownership.leftovers(tmp_path) == [work]
    assert ownership.name_of(work) == "a"
    ownership.clear(work)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["link", "text", "folder link"])
def test_a_left_folder_with_something_foreign_stays_whole(tmp_path: Path, what: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.pt").write_text("x")
    work, hold = ownership.begin(tmp_path / "a")
    hold.release()
    (work / "b.pt").write_text("b")
    if what == "link":
        (work / "c.pt").symlink_to(tmp_path / "mine/a.pt")
    elif what == "folder link":
        (work / "zero").symlink_to(tmp_path / "mine")
    else:
        (work / "notes.txt").write_text("x")
    before = sorted(work.iterdir())
    with pytest.raises(CheckpointError, match="is not removed"):
        ownership.clear(work)
    assert sorted(work.iterdir()) == before and (tmp_path / "mine/a.pt").read_text() == "x"


def test_folders_that_only_look_like_ours_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".x.incomplete").mkdir()
    (tmp_path / ".x.incomplete/a.pt").write_text("x")
    (tmp_path / ".y.zeropipe-0123456789ab.incomplete").mkdir()
    (tmp_path / ".y.zeropipe-0123456789ab.incomplete/a.pt").write_text("x")
    (tmp_path / ".z.incomplete").symlink_to(tmp_path / ".x.incomplete")
    assert ownership.leftovers(tmp_path) == []


# Pruning.


def test_prune_follows_no_links_and_keeps_what_they_point_to(run: Path, tmp_path: Path) -> None:
    """A link among the checkpoints counted as one, was called removed and then ended the command with a traceback."""
    (run / "best").symlink_to("global_step1")
    shutil.copytree(run / "global_step1", tmp_path / "elsewhere")
    (run / "base").symlink_to(tmp_path / "elsewhere")
    done = cli("prune", run, "--keep", 1)
    assert done.exit_code == 0, done.output
    assert {p.name for p in run.iterdir()} == {
        *("best", "base", "global_step1", "global_step3", "latest", "zero_to_fp32.py")
    }
    assert (tmp_path / "elsewhere/zeropipe_manifest.json").exists()
    assert done.output.count("removed") == 1


def test_prune_counts_and_removes_only_what_saves_made(run: Path) -> None:
    """Foreign folders counted among the newest, and copies that somebody had made went."""
    shutil.copytree(run / "global_step1", run / "best")
    (run / "mydata").mkdir()
    (run / "mydata/k_model_states.pt").write_text("mine")
    (run / "global_step1/notes.txt").write_text("mine")
    done = cli("prune", run, "--keep", 2)
    assert done.exit_code == 0 and "notes.txt" in done.output
    assert {p.name for p in run.iterdir() if p.is_dir()} == {
        *("best", "global_step1", "global_step2", "global_step3", "mydata")
    }
    assert list((run / "global_step1").iterdir()) == [run / "global_step1/notes.txt"]
    assert open_source(run, "best").train_state(0).global_steps == 1


def test_prune_says_removed_only_of_what_is_gone(run: Path) -> None:
    (run / "global_step1/mp_rank_00_model_states.pt").unlink()
    (run / "global_step1/mp_rank_00_model_states.pt").symlink_to(run / "latest")
    before = sorted((run / "global_step1").iterdir())
    done = cli("prune", run, "--keep", 1)
    assert done.exit_code == 1 and f"removed {run / 'global_step1'}" not in done.output
    assert (
        sorted((run / "global_step1").iterdir()) == before and (run / "latest").read_text() == "global_step3"
    )
    assert not (run / "global_step2").exists()


# Converting.


@pytest.mark.parametrize("to", ["universal", "dcp"])
@pytest.mark.parametrize("where", ["texts", "run", "tag", "inside", "link", "other kind"])
def test_a_conversion_removes_nothing_but_its_own_older_output(
    run: Path, tmp_path: Path, to: str, where: str
) -> None:
    """``ckpt convert SRC OUT`` deleted whatever OUT was, the source with all its checkpoints too, with exit code 0."""
    out = tmp_path / "out"
    if where == "texts":
        out.mkdir()
        (out / "thesis.txt").write_text("x")
    elif where == "run":
        out = run
    elif where == "tag":
        out = run / "global_step3"
    elif where == "inside":
        out = run / "global_step3" / "made"
    elif where == "link":
        (tmp_path / "home").mkdir()
        (tmp_path / "home/a").write_text("x")
        out.symlink_to(tmp_path / "home")
    else:
        assert cli("convert", run, out, "--to", "dcp" if to == "universal" else "universal").exit_code == 0
    before = tree(tmp_path)
    done = cli("convert", run, out, "--to", to)
    fix = "a folder outside of it" if where == "inside" else "a folder that does not exist"
    assert done.exit_code == 1 and fix in done.output
    assert tree(tmp_path) == before


@pytest.mark.parametrize("write", [write_universal, write_dcp])
def test_a_conversion_may_be_repeated_until_somebody_adds_to_it(
    run: Path, tmp_path: Path, write: Any
) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is as good as none
    first = tree(write(open_source(run, "global_step1"), out))
    write(open_source(run, "global_step3"), out)
    assert open_source(out).train_state(0).global_steps == 3
    assert tree(out).keys() == first.keys()
    (out / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"thesis\.txt"):
        write(open_source(run, "global_step1"), out)
    assert open_source(out).train_state(0).global_steps == 3
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("to", ["universal", "dcp", "deepspeed", "export", "export --torch"])
def test_a_full_disk_says_so_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """torch's writer complained of an unexpected position; half of the files stayed."""
    left = [3_000 if to.startswith("export") else 12_000]

    class Disk(io.FileIO):
        def write(self, data: Any) -> int:
            left[0] -= memoryview(data).nbytes
            if left[0] < 0:
                raise OSError(28, "No space left on device")
            return super().write(data)

    out = tmp_path / "out"
    source = open_source(run)
    monkeypatch.setattr(files, "open", lambda path, mode, **_: Disk(path, mode), raising=False)
    write = {
        "universal": lambda: write_universal(source, out),
        "dcp": lambda: write_dcp(source, out),
        "deepspeed": lambda: convert(source, out, stage=1, dp=2),
    }.get(to, lambda: export(source, out, safetensors=to == "export"))
    with pytest.raises(CheckpointError, match="No space left on device"):
        write()
    assert [p for p in tmp_path.rglob("*") if p.is_file() and run not in p.parents] == []
    assert to == "deepspeed" or not out.exists()  # a folder of checkpoints is made for more than this one


# Exporting.


def exports(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def read_as_transformers_does(folder: Path) -> dict[str, torch.Tensor]:
    """The first of the names that is there."""
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        path = folder / name
        if path.exists() and name.endswith("json"):
            files = set(json.loads(path.read_text())["weight_map"].values())
            return {k: v for file in files for k, v in load_file(folder / file).items()}
        if path.exists():
            return load_file(path) if name.endswith("safetensors") else torch.load(path, weights_only=True)
    return torch.load(folder / "pytorch_model-00001-of-00002.bin", weights_only=True)


@pytest.mark.parametrize("first", [{}, {"max_shard_size": "3KB"}, {"safetensors": False}])
@pytest.mark.parametrize("second", [{}, {"max_shard_size": "5KB"}, {"safetensors": False}])
def test_an_export_replaces_an_older_one_whole(
    engine: Any, tmp_path: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    """An older ``model.safetensors``, index or shard stayed, and transformers loaded the old weights."""
    engine.save_checkpoint(tmp_path / "run", tag="a")
    with torch.no_grad():
        saved = engine.module.wide.weight.clone()
        engine.module.wide.weight += 1
    engine.save_checkpoint(tmp_path / "run", tag="b")
    with torch.no_grad():
        engine.module.wide.weight -= 1
    new, only = tmp_path / "new", tmp_path / "only"
    (new / "sub").mkdir(parents=True)
    (new / "config.json").write_text("{}")
    export(open_source(tmp_path / "run", "a"), new, **first)
    export(open_source(tmp_path / "run", "b"), new, **second)
    export(open_source(tmp_path / "run", "b"), only, **second)
    assert exports(new) == sorted([*exports(only), "config.json", "sub"])
    assert torch.allclose(read_as_transformers_does(new)["wide.weight"], saved + 1)


def test_an_export_does_not_replace_what_somebody_else_wrote(run: Path, tmp_path: Path) -> None:
    base = {"w": torch.zeros(3)}
    torch.save(base, tmp_path / "pytorch_model.bin")
    export(open_source(run), tmp_path, safetensors=True)  # read before it: it is in nobody's way
    assert exports(tmp_path) == ["model.safetensors", "pytorch_model.bin", "run"]
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin stands in the way"):
        export(open_source(run), tmp_path, safetensors=False)
    assert torch.equal(torch.load(tmp_path / "pytorch_model.bin")["w"], base["w"])
    assert exports(tmp_path) == ["model.safetensors", "pytorch_model.bin", "run"]


@pytest.mark.parametrize("text", ["1.2.3GB", "0", "0GB", "0.0000001KB", ".", "1e3", "٣GB", "inf", "nan"])
def test_sizes_that_are_none(text: str) -> None:
    """``1.2.3GB`` ended in Python's words about a float, ``0`` made a file of each tensor."""
    with pytest.raises(CheckpointError, match="size of a shard"):
        parse_size(text)


# A manifest that is gone.


def test_our_files_without_their_manifest_are_refused(engine: Any, run: Path) -> None:
    """They were read as DeepSpeed's, so that a missing manifest switched the checks off in silence."""
    (run / "global_step3/zeropipe_manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is gone"):
        engine.load_checkpoint(run, tag="global_step3")
    with pytest.raises(CheckpointError, match=r"manifest\.json is gone"):
        open_source(run, "global_step3")
    assert engine.load_checkpoint(run)[0] == str(run / "global_step2")
    assert engine.load_checkpoint(run, tag="global_step3", verify=False)[0] == str(run / "global_step3")
    assert next(f.state for f in verify(run / "global_step3")) is FileState.MISSING
    assert cli("verify", run, "--tag", "global_step3").exit_code == 1


def test_another_end_of_line_in_a_manifest_is_damage(run: Path) -> None:
    """Read as text it looked like the same, so that ``verify`` passed over a changed byte."""
    path = run / "global_step3/zeropipe_manifest.json"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r", 1))
    assert [f.file for f in verify(path.parent) if not f.good] == [path.name]


# Names that come from a file.

OUT = ["../../x", "/etc/x", "..", "a/../../x", "", "a//b", "./a", "a\\b", "a\0b"]


@pytest.mark.parametrize("name", OUT)
def test_a_name_never_leads_out_of_its_folder(name: str) -> None:
    with pytest.raises(CheckpointError, match="would lead out of"):
        inside(Path("folder"), name, "a name")


@pytest.mark.parametrize("name", OUT)
def test_tensors_with_such_names_are_written_nowhere(run: Path, tmp_path: Path, name: str) -> None:
    """A tensor called ``../../x`` made ``convert --to universal`` write outside of its output."""
    rewrite_manifest(run / "global_step3", rename={"calls": name})
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="would lead out of"):
        write_universal(open_source(run), tmp_path / "deep/out")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", OUT[:2])
@pytest.mark.parametrize("field", ["files", "module", "flats", "rank_files", "state key"])
def test_files_outside_of_the_folder_are_not_read(run: Path, tmp_path: Path, name: str, field: str) -> None:
    rewrite_manifest(run / "global_step3", **{field.replace(" ", "_"): name})
    with pytest.raises(CheckpointError, match=r"would lead out of|no size and checksum"):
        write_universal(open_source(run, "global_step3"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_universal_name_with_a_slash_goes_there_and_back(run: Path, tmp_path: Path) -> None:
    """``register_parameter("a/b", ...)`` is allowed: a folder in a folder, which ended in an error."""
    rewrite_manifest(run / "global_step3", rename={"calls": "calls/all"})
    out = write_universal(open_source(run), tmp_path / "out")
    assert (out / "zero/calls/all/fp32.pt").exists()
    names = {entry.name for entry in open_source(out).module}
    assert "calls/all" in names and "calls" not in names


@pytest.mark.parametrize("name", ["../x0.distcp", "/etc/passwd0"])
def test_a_dcp_index_does_not_lead_out_of_its_folder(run: Path, tmp_path: Path, name: str) -> None:
    out = write_dcp(open_source(run), tmp_path / "out")
    data = (out / ".metadata").read_bytes()
    (out / ".metadata").write_bytes(data.replace(b"__0_0.distcp", name.encode()))  # as long
    chunk = next(iter(read_index(out).values())).chunks[0]
    with pytest.raises(CheckpointError, match="would lead out of"):
        read_chunk(out, chunk)
    with pytest.raises(CheckpointError, match="would lead out of"):
        open_source(out)


@pytest.mark.parametrize("text", ["../run/global_step1", "/etc", "..", "a/b"])
def test_latest_does_not_lead_out_of_the_folder(run: Path, text: str) -> None:
    (run / "latest").write_text(text)
    choice = tags.choose(run, None)
    assert choice.candidates[0].path == run / "global_step3" and "is not there" in choice.notices[0]


# Looking.


def test_an_unreadable_folder_beside_the_checkpoints_is_passed_over(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``lost+found`` of a volume's root stopped every load, although ``latest`` was good."""
    (run / "lost+found").mkdir()
    real = os.listdir

    def listdir(path: Any) -> list[str]:
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    assert tags.choose(run, None).candidates[0].tag == "global_step3"
    assert cli("inspect", run).exit_code == 0


def test_tools_show_names_as_they_are(run: Path) -> None:
    """rich took ``[0]`` in a parameter's name for markup and printed nothing of it."""
    rewrite_manifest(run / "global_step3", rename={"calls": "calls[bold]x[/] [0]\x1b[2J"})
    shown = cli("inspect", run, "--tensors").output
    assert "calls[bold]x[/] [0]\\x1b[2J" in "".join(shown.split("\n")) and "\x1b[2J" not in shown


def test_diff_sees_hyperparameters_and_client_state(engine: Any, tmp_path: Path) -> None:
    """Two checkpoints that differ in the learning rate or in the client's counters were called equal."""
    engine.save_checkpoint(tmp_path / "a", client_state={"epoch": 1, "best": [1.0]})
    old = engine.optimizer.param_groups[0]["weight_decay"]
    engine.optimizer.param_groups[0]["weight_decay"] = 0.7
    engine.save_checkpoint(tmp_path / "b", client_state={"epoch": 2, "best": [1.0]})
    engine.optimizer.param_groups[0]["weight_decay"] = old
    done = cli("diff", tmp_path / "a", tmp_path / "b")
    assert done.exit_code == 1 and "weight_decay" in done.output and "epoch" in done.output
    assert "best" not in done.output and "betas" not in done.output
    assert cli("diff", tmp_path / "a", tmp_path / "a").exit_code == 0
