"""``from_pretrained`` under stage 3: each rank reads its own shards; the model and the report are those without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.ranks import Ranks


def same(found: dict) -> None:
    assert found["different"] == []
    assert found["report"] == found["expected"]


@pytest.mark.parametrize(
    ("kind", "world", "precision", "torch_file"),
    [
        ("llama", 2, "bf16", False),
        ("llama", 3, "fp32", True),  # a file of torch, bf16 in it
        ("tied", 2, "bf16", False),
        ("mixtral", 4, "bf16", False),  # gate and up of all experts become one parameter
        ("qwen", 3, "fp32", False),
        ("gpt2", 2, "fp32", True),
        ("resnet", 2, "fp32", False),  # buffers, of two dtypes
    ],
)
def test_the_bits_and_the_report_are_those_without_zero(
    ranks: Ranks, tmp_path, kind, world, precision, torch_file
):
    folder = str(tmp_path)
    ranks.run("pretrained_tasks.save", 1, folder=folder, kind=kind, torch_file=torch_file)
    dtype = {"dtype": "float32"} if precision == "fp32" else {}
    how = "base" if kind == "resnet" else "causal"
    for found in ranks.run(
        "pretrained_tasks.load", world, folder=folder, how=how, precision=precision, **dtype
    ):
        same(found)
        assert all(found["ties"])
        assert found["ties"] or kind not in ("tied", "gpt2")


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="what a process reads is counted by Linux")
def test_every_byte_is_read_once(ranks: Ranks, tmp_path):
    ranks.run("pretrained_tasks.save", 1, folder=str(tmp_path), kind="mixtral", dtype="float32")
    weights = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    found = ranks.run("pretrained_tasks.load", 2, folder=str(tmp_path), precision="fp32", counted=True)
    other = 60_000  # the configurations, the index and headers, on each rank
    assert weights - other < sum(one["read"] for one in found) < weights + 2 * other


def test_a_new_head_is_missing_and_the_old_one_unexpected(ranks: Ranks, tmp_path):
    ranks.run("pretrained_tasks.save", 1, folder=str(tmp_path), kind="llama")
    found = ranks.run("pretrained_tasks.load", 2, folder=str(tmp_path), how="classes")
    for one in found:
        same(one)
        assert one["report"]["missing_keys"] == ["score.weight"]
        assert one["report"]["unexpected_keys"] == ["lm_head.weight"]


def test_another_size_is_a_mismatch_that_may_be_ignored(ranks: Ranks, tmp_path):
    ranks.run("pretrained_tasks.save", 1, folder=str(tmp_path), kind="llama")
    given = {"vocab_size": 80, "ignore_mismatched_sizes": True}
    for one in ranks.run("pretrained_tasks.load", 2, folder=str(tmp_path), **given):
        same(one)
        assert len(one["report"]["mismatched_keys"]) == 2


@pytest.mark.parametrize("kind", ["same", "other"])
def test_both_of_a_tied_pair_in_the_files(ranks: Ranks, tmp_path, kind):
    ranks.run("pretrained_tasks.save", 1, folder=str(tmp_path), kind="tied")
    ranks.run("pretrained_tasks.change", 1, folder=str(tmp_path), kind=kind)
    for one in ranks.run("pretrained_tasks.load", 2, folder=str(tmp_path)):
        same(one)
        assert one["ties"] == ([True] if kind == "same" else [])


def test_a_conversion_that_needs_the_whole_tensor(ranks: Ranks, tmp_path):
    ranks.run("pretrained_tasks.save", 1, folder=str(tmp_path), kind="tied")
    ranks.run("pretrained_tasks.change", 1, folder=str(tmp_path), kind="transposed")
    given = {"transposed": True, "tie_word_embeddings": False}
    for one in ranks.run("pretrained_tasks.load", 3, folder=str(tmp_path), **given):
        same(one)
        assert one["report"]["missing_keys"] == []


def test_a_cut_file_is_the_same_error_on_every_rank(ranks: Ranks, tmp_path):
    ranks.run("pretrained_tasks.save", 1, folder=str(tmp_path), kind="llama")
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-40])
    first, second = ranks.run("pretrained_tasks.refused", 2, folder=str(tmp_path))
    assert first == second
    assert first[0] == "CheckpointError"
    assert f"{file.name} is cut before the end of" in first[1]


@pytest.mark.parametrize("kind", ["mixtral", "tied"])
def test_init_with_weights_names_and_fuses_as_from_pretrained_does(ranks: Ranks, tmp_path, kind):
    ranks.run("pretrained_tasks.save", 1, folder=str(tmp_path), kind=kind)
    for different, error in ranks.run("pretrained_tasks.init", 2, folder=str(tmp_path), sizes={}):
        assert (different, error) == ([], "")
    first, second = ranks.run("pretrained_tasks.init", 2, folder=str(tmp_path), sizes={"vocab_size": 80})
    assert first == second
    assert "model.embed_tokens.weight: (64, 32), not (80, 32)" in first[1]
