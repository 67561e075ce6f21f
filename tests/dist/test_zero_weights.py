"""zero.Init(weights=): a model out of files, each rank its own elements, the values of a plain load to the bit."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import zeropipe
from zeropipe.errors import CheckpointError, DesyncError, UsageError

WIDTH = 24
BF16 = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}


class Renamed(nn.Linear):
    """Loads files of another time, whose key it renames, and counts its loads."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        old = state.pop(f"{prefix}kernel", None)
        if old is not None:
            state[f"{prefix}weight"] = old.t()
        super()._load_from_state_dict(state, prefix, *args)


class Odd(nn.Module):
    """A scalar, an empty one, one smaller than the ranks, a frozen one, a tied pair, buffers of odd dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH + i) for i in range(2))
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.pair = nn.Parameter(torch.randn(2))
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.frozen = nn.Parameter(torch.randn(5, 3), requires_grad=False)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.renamed = Renamed(4, 6)
        self.register_buffer("mask", torch.rand(7) > 0.5)
        self.register_buffer("wide", torch.randn(3, dtype=torch.float64))
        self.head = nn.Linear(WIDTH, 37, bias=False)
        self.head.weight = self.embed.weight


def values(seed: int = 5) -> dict[str, torch.Tensor]:
    """Another state of an ``Odd`` than its constructor's, without the second name of the tied pair."""
    torch.manual_seed(seed)
    state = {
        name: torch.rand_like(tensor)
        if tensor.is_floating_point()
        else ~tensor
        if tensor.dtype == torch.bool
        else tensor + 3
        for name, tensor in Odd().state_dict().items()
        if name != "head.weight"
    }
    state["renamed.kernel"] = state.pop("renamed.weight").t().contiguous()
    return state


def save(folder: Path, state: dict[str, torch.Tensor], files: int = 3) -> Path:
    """As ``save_pretrained`` cuts a model: files and an index."""
    folder.mkdir(exist_ok=True)
    names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    owner = {key: names[i % files] for i, key in enumerate(state)}
    for name in names:
        save_file({key: tensor for key, tensor in state.items() if owner[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owner}))
    return folder


def read_by_this_process() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def built(
    rank: int, world: int, weights: Any, config: Any = None, meta: bool = False
) -> dict[str, torch.Tensor]:
    torch.manual_seed(rank)
    if meta:
        with torch.device("meta"):
            model = Odd()
        zeropipe.zero.Init(module=model, config_dict_or_path=config, weights=weights)
    else:
        with zeropipe.zero.Init(config_dict_or_path=config, weights=weights):
            model = Odd()
    assert model.head.weight is model.embed.weight
    assert not model.frozen.requires_grad
    return whole(model)


def plain(state: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What ``load_state_dict`` makes of it in one process; in 16 bits parameters are cast, but for batch norm's."""
    model = Odd()
    model.load_state_dict(state, strict=False)
    for name, param in model.named_parameters():
        if not name.startswith("norm."):
            param.data = param.data.to(dtype)
    return model.state_dict()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.native
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_rank_has_what_a_plain_load_gives(pool, tmp_path, world, precision):
    folder = save(tmp_path / "model", values())
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    config = BF16 if precision == "bf16" else None
    for found in pool(world).run(built, str(folder), config):
        same(found, plain(values(), dtype))


@pytest.mark.parametrize("where", ["replicas", "host", "files"])
def test_wherever_shards_lie(pool, tmp_path, where):
    folder = save(tmp_path / "model", values())
    zero: dict[str, Any] = {"stage": 3}
    if where == "replicas":
        zero["mics_shard_size"] = 2
    else:
        zero["offload_param"] = {"device": "cpu" if where == "host" else "nvme", "nvme_path": str(tmp_path)}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    for found in pool(4 if where == "replicas" else 2).run(built, str(folder), config):
        same(found, plain(values()))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from /proc")
def test_a_rank_holds_its_shard_and_the_largest_tensor_at_most(pool, tmp_path):
    state = {f"{i}.weight": torch.ones(1024, 1024 + 512 * (i % 3)) for i in range(24)}
    folder = save(tmp_path / "model", state)
    largest, total = max(t.nbytes for t in state.values()), sum(t.nbytes for t in state.values())
    for grown in pool(4).run(most_resident, str(folder)):
        assert grown < 1.15 * (total / 4 + largest)


def most_resident(rank: int, world: int, folder: str) -> int:
    with zeropipe.zero.Init():  # what the first use costs
        nn.Linear(8, 8)
    Path("/proc/self/clear_refs").write_text("5")
    before = most()
    with zeropipe.zero.Init(weights=folder):
        model = nn.ModuleList(nn.Linear(1024 + 512 * (i % 3), 1024, bias=False) for i in range(24))
    assert len(model) == 24
    return most() - before


def most() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.parametrize("kind", ["torch", "files"])
def test_other_files_onto_a_model_on_meta(pool, tmp_path, kind):
    state = values()
    if kind == "torch":  # a state dict of torch may hold views and transposed tensors
        state["blocks.0.weight"] = state["blocks.0.weight"].t().contiguous().t()
        weights: Any = str(tmp_path / "pytorch_model.bin")
        torch.save(state, weights)
    else:
        weights = [str(file) for file in save(tmp_path / "model", state).glob("*.safetensors")]
    for found in pool(2).run(built, weights, None, "meta"):
        same(found, plain(state))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="what a process reads is counted by Linux")
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_byte_is_read_once_over_all_ranks(pool, tmp_path, world):
    state = {f"{i}.weight": torch.randn(512, 256 + 8 * i) for i in range(4)}
    folder = save(tmp_path / "model", state)
    counts = pool(world).run(read_for, str(folder))
    total = sum(tensor.nbytes for tensor in state.values())
    assert total <= sum(counts) < total + world * 40_000, "headers and what reads the count come on top"
    assert max(counts) < total / world + 40_000


def read_for(rank: int, world: int, folder: str) -> int:
    before = 0
    for _ in range(2):  # the first use reads modules of Python, too
        before = read_by_this_process()
        with zeropipe.zero.Init(weights=folder):
            nn.ModuleList(nn.Linear(256 + 8 * i, 512, bias=False) for i in range(4))
    return read_by_this_process() - before


def test_what_is_missing_keeps_the_constructors_value_and_is_named(pool, tmp_path):
    state = values()
    del state["pair"], state["blocks.1.weight"]
    folder = save(tmp_path / "model", state | {"other": torch.ones(3)})
    torch.manual_seed(0)  # rank 0's
    expected = plain(state)
    for found, said in pool(2).run(built_and_said, str(folder)):
        same(
            {k: v for k, v in found.items() if k not in ("pair", "blocks.1.weight")},
            {k: v for k, v in expected.items() if k not in ("pair", "blocks.1.weight")},
        )
        assert torch.equal(found["pair"], expected["pair"])
        assert torch.equal(found["blocks.1.weight"], expected["blocks.1.weight"])
        assert said == ["zero.Init: 2 names have no weights: blocks.1.weight, pair; 1 keys are unused: other"]


def built_and_said(rank: int, world: int, weights: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("zeropipe.runtime.zero.gather.weights")
    logger.addHandler(handler)
    try:
        return built(rank, world, weights), said
    finally:
        logger.removeHandler(handler)


def test_mixed_precision_on_purpose_stays(pool, tmp_path):
    state = {"narrow.weight": torch.randn(8, 8), "wide.weight": torch.randn(8, 8)}
    folder = save(tmp_path / "model", state, files=1)
    for dtypes, wide in pool(2).run(build_mixed, str(folder)):
        assert dtypes == {"narrow.weight": torch.bfloat16, "wide.weight": torch.float32}
        assert torch.equal(wide, state["wide.weight"])


def build_mixed(rank: int, world: int, weights: str) -> tuple[dict[str, torch.dtype], torch.Tensor]:
    with zeropipe.zero.Init(config_dict_or_path=BF16, weights=weights):
        model = nn.ModuleDict(
            {"wide": nn.Linear(8, 8, bias=False), "narrow": nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)}
        )
    state = whole(model)
    return {name: value.dtype for name, value in state.items()}, state["wide.weight"]


# ---- what does not fit, alike on every rank ----


def cut(folder: Path, state: dict[str, torch.Tensor]) -> None:
    file = sorted(save(folder, state).glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-40])


def lost(folder: Path, state: dict[str, torch.Tensor]) -> None:
    sorted(save(folder, state).glob("*.safetensors"))[1].unlink()


def shaped(folder: Path, state: dict[str, torch.Tensor]) -> None:
    save(folder, state | {"frozen": torch.randn(5, 4)})


def coded(folder: Path, state: dict[str, torch.Tensor]) -> None:
    save(folder, state | {"frozen": torch.zeros(5, 3, dtype=torch.int8)})


def foreign(folder: Path, state: dict[str, torch.Tensor]) -> None:
    save(folder, {"lm.x": torch.ones(2)}, files=1)


def garbled(folder: Path, state: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"not weights at all")


def empty(folder: Path, state: dict[str, torch.Tensor]) -> None:
    folder.mkdir()


def twice(folder: Path, state: dict[str, torch.Tensor]) -> None:
    save(folder, state)
    (folder / "model.safetensors.index.json").unlink()
    save_file({"pair": torch.ones(2)}, folder / "again.safetensors")


@pytest.mark.parametrize(
    ("damage", "kind", "says"),
    [
        (cut, CheckpointError, "model-00002-of-00003.safetensors is cut before the end of"),
        (lost, CheckpointError, "expected 3 files, found no model-00002-of-00003.safetensors"),
        (
            shaped,
            CheckpointError,
            r"key 'frozen' of \S+.safetensors; expected shape \(5, 3\), found \(5, 4\)",
        ),
        (coded, CheckpointError, "key 'frozen' of .* found torch.int8. Fix: "),
        (foreign, UsageError, "no key of the weights is a name of the Odd"),
        (garbled, CheckpointError, "model.safetensors is cut, or no safetensors file"),
        (empty, CheckpointError, "no weights in the folder"),
        (twice, CheckpointError, "key 'pair' is in two files"),
    ],
)
def test_what_does_not_fit_is_named_on_every_rank(pool, tmp_path, damage, kind, says):
    damage(tmp_path / "model", values())
    first, second = pool(2).run(refused, str(tmp_path / "model"))
    assert first == second
    assert first[0] == kind.__name__
    assert re.search(says, first[1]), first[1]


def refused(rank: int, world: int, weights: str) -> tuple[str, str]:
    with pytest.raises((CheckpointError, UsageError, DesyncError)) as caught:
        built(rank, world, weights)
    built(rank, world, None)  # nothing of it is left: the next one is built
    return type(caught.value).__name__, str(caught.value)


def test_files_that_differ_between_ranks_are_named(pool, tmp_path):
    save(tmp_path / "0", values())
    save(tmp_path / "1", values() | {"pair": torch.ones(3)})
    for kind, said in pool(2).run(differing, str(tmp_path)):
        assert kind == "DesyncError"
        assert "'pair' of the weights" in said


def differing(rank: int, world: int, folder: str) -> tuple[str, str]:
    return refused(rank, world, f"{folder}/{rank}")


def test_two_models_in_one_context_are_refused(pool, tmp_path):
    save(tmp_path / "model", values())
    for said in pool(2).run(two_models, str(tmp_path / "model")):
        assert "expected one that is built inside the context, found Odd, Linear" in said


def two_models(rank: int, world: int, weights: str) -> str:
    with pytest.raises(UsageError) as caught, zeropipe.zero.Init(weights=weights):
        kept = Odd(), nn.Linear(3, 3)
    assert kept
    return str(caught.value)
