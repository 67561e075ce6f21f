"""The tools on finished checkpoints: command line, export, conversion, comparison, universal folders, foreign files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import zeropipe.utils.zero_to_fp32 as z2f
from tests.helpers.checkpointing import assert_same_state, make_engine, pieces, train, whole
from tests.helpers.models import NastyModel, build
from zeropipe.checkpoint.convert import compare, convert
from zeropipe.checkpoint.export import export, parse_size
from zeropipe.checkpoint.loader import open_source
from zeropipe.checkpoint.save.files import load_torch
from zeropipe.checkpoint.save.records import FlatState, Grid, LocalState, ModelState
from zeropipe.checkpoint.save.saver import Saver
from zeropipe.checkpoint.sources.universal import write_universal
from zeropipe.checkpoint.universal_checkpoint import enable_universal_checkpoint
from zeropipe.cli.ckpt import app
from zeropipe.comm.group import SELF
from zeropipe.errors import CheckpointError
from zeropipe.layout.flat import flat_shards

SHAPES = [(0, 1), (1, 3), (2, 2), (3, 1), (3, 4)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, the engine that saved it at step 2, its weights); step 1 is there too."""
    folder = tmp_path_factory.mktemp("saved")
    engine = make_engine(1)
    for _ in range(2):
        train(engine, 1, 0)
        engine.save_checkpoint(folder, client_state={"epoch": 1})
    return folder, engine, {n: t.clone() for n, t in engine.module.state_dict().items()}


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    if code == 0 and result.exception is not None:
        raise result.exception
    assert result.exit_code == code or isinstance(result.exception, CheckpointError)
    return result.output + (str(result.exception) if code else "")


def test_inspect_reads_no_tensor_and_names_what_is_there(saved: Any) -> None:
    text = run("inspect", saved[0], "--tensors")
    for word in ("ZeRO stage 1", "AdamW", "fp32 master", "exp_avg", "epoch", "head.weight = embed.weight",
                 "wide.weight", "2 (8 samples"):  # fmt: skip
        assert word in text, word


def test_verify_names_the_damaged_file(saved: Any, tmp_path: Path) -> None:
    assert "whole" in run("verify", saved[0])
    convert(open_source(saved[0]), tmp_path, stage=2, dp=2)
    file = tmp_path / "global_step2" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    data = bytearray(file.read_bytes())
    data[-40] ^= 4
    file.write_bytes(bytes(data))
    (tmp_path / "global_step2" / "stray.txt").write_text("x")
    text = run("verify", tmp_path, code=1)
    assert "damaged" in text and file.name in text and "stray.txt" in text


def test_diff_finds_one_changed_element(saved: Any, tmp_path: Path) -> None:
    assert "equal" in run("diff", saved[0], saved[0])
    text = run("diff", saved[0], saved[0], "--left-tag", "global_step1", code=1)
    assert "wide.weight" in text and "exp_avg_sq" in text and "step" in text and "global_steps" in text


@pytest.mark.parametrize(("stage", "dp"), SHAPES)
def test_convert_keeps_every_value(saved: Any, tmp_path: Path, stage: int, dp: int) -> None:
    folder, engine, _ = saved
    run("convert", folder, tmp_path, "--stage", stage, "--dp", dp)
    source = open_source(tmp_path)
    assert (source.stage, source.degrees["dp"]) == (stage, dp)
    assert list(compare(open_source(folder), source)) == []
    other = make_engine(2, seed=1)
    other.load_checkpoint(tmp_path)
    assert_same_state(whole([pieces(engine)]), whole([pieces(other)]))


def test_two_hops_are_one(saved: Any, tmp_path: Path) -> None:
    convert(open_source(saved[0]), tmp_path / "a", stage=3, dp=3)
    convert(open_source(tmp_path / "a"), tmp_path / "b", stage=1, dp=4)
    convert(open_source(saved[0]), tmp_path / "c", stage=1, dp=4)
    for name in os.listdir(tmp_path / "c/global_step2"):
        if name.endswith("optim_states.pt"):
            files = (load_torch(tmp_path / x / "global_step2" / name) for x in "bc")
            b, c = (file["zeropipe"]["flats"] for file in files)
            assert all(
                torch.equal(b[f]["tensors"][k], c[f]["tensors"][k]) for f in c for k in c[f]["tensors"]
            )


def test_the_universal_folder_has_every_parameter_and_loads(saved: Any, tmp_path: Path) -> None:
    folder, engine, _ = saved
    run("convert", folder, tmp_path / "uni", "--to", "universal")
    assert (tmp_path / "latest_universal").read_text() == "uni"
    names = set(os.listdir(tmp_path / "uni/zero/wide.weight"))
    assert names == {"fp32.pt", "exp_avg.pt", "exp_avg_sq.pt", "step.pt"}
    other = make_engine(1, seed=1)
    path, client = other.load_checkpoint(tmp_path, "uni")
    assert Path(path).name == "uni" and client["epoch"] == 1 and other.global_steps == 2
    assert_same_state(whole([pieces(engine)]), whole([pieces(other)]))
    assert list(compare(open_source(folder), open_source(tmp_path / "uni"))) == []


def test_a_parameter_loads_its_own_universal_slice(saved: Any, tmp_path: Path) -> None:
    write_universal(open_source(saved[0]), tmp_path / "uni")
    whole_weight = saved[2]["wide.weight"]
    param = torch.nn.Parameter(torch.zeros(whole_weight.shape[0] // 2, whole_weight.shape[1]))
    enable_universal_checkpoint([param])
    step = param.load_hp_checkpoint_state(tmp_path / "uni/zero/wide.weight", 1, 2)  # type: ignore[operator]
    assert step == 2
    assert torch.equal(param.detach(), whole_weight[whole_weight.shape[0] // 2 :])
    assert param.hp_state["exp_avg"].numel() == param.numel()  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="does not fit"):
        param.load_hp_checkpoint_state(tmp_path / "uni/zero/few", 0, 1)  # type: ignore[operator]


@pytest.mark.parametrize("size", ["5GB", "2KB", "1"])
@pytest.mark.parametrize("torch_format", [False, True])
def test_export_loads_strictly_into_a_plain_model(
    saved: Any, tmp_path: Path, size: str, torch_format: bool
) -> None:
    run("export", saved[0], tmp_path, "--max-shard-size", size, *(["--torch"] if torch_format else []))
    suffix = "bin" if torch_format else "safetensors"
    files = sorted(tmp_path.glob(f"*.{suffix}"))
    assert (len(files) == 1) == (size == "5GB")
    state: dict[str, torch.Tensor] = {}
    for file in files:
        state |= torch.load(file, weights_only=True) if torch_format else load_file(file)
    if len(files) > 1:
        index = json.loads(next(tmp_path.glob("*.index.json")).read_text())
        assert set(index["weight_map"]) == set(state)
        assert {f.name for f in files} == set(index["weight_map"].values())
    model = build(NastyModel, seed=5)
    model.load_state_dict(state, strict=True)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in saved[2].items())


def test_export_in_16_bits_and_without_tied_names(saved: Any, tmp_path: Path) -> None:
    export(open_source(saved[0]), tmp_path, dtype="bf16", tied="drop")
    state = load_file(tmp_path / "model.safetensors")
    assert "head.weight" not in state and state["calls"].dtype == torch.int64
    assert torch.equal(state["wide.weight"], saved[2]["wide.weight"].bfloat16())
    with pytest.raises(CheckpointError, match="dtype of the export"):
        export(open_source(saved[0]), tmp_path, dtype="int3")


@pytest.mark.process
def test_export_holds_one_tensor_in_memory(tmp_path: Path) -> None:
    """60 tensors of 4 MB each: the peak is that of a few of them, whatever their number."""
    layout = flat_shards([(f"w{i}", (1024, 1024), "float32") for i in range(60)], 1)
    flat = FlatState("g", layout, 0, {"fp32": torch.ones(layout.shard_numel)})
    Saver(SELF).save(tmp_path, "t", LocalState(Grid(), 2, "float32", ModelState({}), (flat,)))
    script = f"""
from zeropipe.checkpoint.loader import open_source
from zeropipe.checkpoint.export import export
def anonymous():
    line = next(l for l in open('/proc/self/status') if l.startswith('RssAnon'))
    return int(line.split()[1]) * 1024
source = open_source({str(tmp_path)!r})
start, seen = anonymous(), []
export(source, {str(tmp_path / "out")!r}, progress=lambda done: seen.append(anonymous()))
print(len(seen), max(seen) - start)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    count, peak = map(int, done.stdout.split())
    assert count == 60
    assert peak < 10 * 4 * 2**20  # of 240 MB; most of it is what torch allocates on first use


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5kb", 1500), ("1GiB", 2**30), (7, 7), ("8B", 8)]
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-1"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(CheckpointError, match="size of a shard"):
        parse_size(text)


def test_prune_keeps_the_newest_and_removes_leftovers(saved: Any, tmp_path: Path) -> None:
    engine = saved[1]
    for tag in ("a", "b", "c"):
        engine.save_checkpoint(tmp_path, tag)
        engine.clock.global_steps += 1
    engine.clock.global_steps -= 3
    (tmp_path / ".d.incomplete").mkdir()
    (tmp_path / "latest").write_text("a")
    assert "would remove" in run("prune", tmp_path, "--keep", 1, "--dry-run")
    assert (tmp_path / "b").exists()
    run("prune", tmp_path, "--keep", 1)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["a", "c"]


# zero_to_fp32.


def test_the_fp32_state_dict_is_the_whole_model(saved: Any) -> None:
    folder, _, expected = saved
    state = z2f.get_fp32_state_dict_from_zero_checkpoint(folder)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[n], t) for n, t in expected.items())
    assert state["head.weight"] is state["embed.weight"]
    lazy = z2f.get_fp32_state_dict_from_zero_checkpoint(folder, lazy_mode=True)
    assert not torch.is_tensor(lazy["wide.weight"])
    assert torch.equal(lazy["wide.weight"].contiguous(), expected["wide.weight"])
    assert "frozen.weight" not in z2f.get_fp32_state_dict_from_zero_checkpoint(
        folder, exclude_frozen_parameters=True
    )
    model = z2f.load_state_dict_from_zero_checkpoint(build(NastyModel, seed=7), folder)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in expected.items())


@pytest.mark.process
def test_the_script_beside_the_checkpoint_works(saved: Any, tmp_path: Path) -> None:
    script = str(saved[0] / "zero_to_fp32.py")
    subprocess.run([sys.executable, script, str(saved[0]), str(tmp_path), "--safe_serialization"], check=True)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["wide.weight"], saved[2]["wide.weight"])


def test_file_helpers_that_clients_call(saved: Any) -> None:
    folder = saved[0] / "global_step2"
    (optim,) = z2f.get_optim_files(folder)
    assert z2f.get_model_state_file(folder, 2).endswith("mp_rank_00_model_states.pt")
    assert optim.endswith("zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(FileNotFoundError):
        z2f.get_model_state_file(folder, 3)


def test_a_folder_that_is_no_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        open_source(tmp_path)
    (tmp_path / "x_model_states.pt").write_bytes(b"?")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        open_source(tmp_path)
