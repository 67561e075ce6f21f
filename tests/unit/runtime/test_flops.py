"""The profile of a model: operations by formula, each module's own share, and a model that is as before afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from zeropipe.errors import UsageError
from zeropipe.runtime.flops import (
    FlopsProfiler,
    describe_profile,
    duration_to_string,
    flops_to_string,
    get_model_profile,
    macs_to_string,
    number_to_string,
    params_to_string,
)

BATCH, LENGTH, WIDTH, HEADS = 2, 8, 16, 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(x).view(*x.shape[:2], 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).reshape(x.shape))


def model() -> nn.Module:
    return nn.Sequential(Attention(), nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH)})["a"], nn.Linear(WIDTH, 3))


ROWS = BATCH * LENGTH
ATTENTION = 2 * ROWS * (3 * WIDTH * WIDTH + WIDTH * WIDTH) + 4 * BATCH * LENGTH * LENGTH * WIDTH
FLOPS = ATTENTION + 2 * ROWS * (WIDTH * WIDTH + 3 * WIDTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_operations_are_those_of_the_formulas(dtype: torch.dtype) -> None:
    made = model().to(dtype).train()
    flops, macs, params = get_model_profile(
        made, (BATCH, LENGTH, WIDTH), as_string=False, print_profile=False
    )
    assert (flops, macs) == (FLOPS, FLOPS // 2)
    assert params == sum(p.numel() for p in made.parameters())
    assert made.training and all(not m._forward_hooks and not m._forward_pre_hooks for m in made.modules())
    assert all(p.grad is None for p in made.parameters())


def test_attention_that_is_spelt_out_counts_the_same() -> None:
    class Spelt(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
            mixed = ((q @ k.mT) / 2).softmax(-1) @ v
            return x + self.out(mixed.transpose(1, 2).reshape(x.shape))

    shape = (BATCH, LENGTH, WIDTH)
    for kind in (Attention, Spelt):
        assert get_model_profile(kind(), shape, as_string=False, print_profile=False)[0] == ATTENTION


def test_convolutions_and_a_recurrent_layer() -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    found = get_model_profile(conv, (2, 3, 6, 7), as_string=False, print_profile=False)
    assert found[0] == 2 * 2 * 5 * 3 * 9 * 6 * 7
    cell = nn.GRUCell(4, 6)
    assert get_model_profile(cell, (3, 4), as_string=False, print_profile=False)[0] == 2 * 3 * 18 * (4 + 6)


class Twice(nn.Module):
    """A module that is called twice, one that is never called, and one that calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.never = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, more: int = 1) -> torch.Tensor:
        return self(self.again(x), more - 1) if more else self.again(x)


def test_modules_that_are_called_several_times_or_never() -> None:
    profiler = FlopsProfiler(made := Twice())
    profiler.start_profile()
    made(torch.ones(5, 4))
    profiler.stop_profile()
    made(torch.ones(5, 4))  # after it was stopped
    once = 2 * 5 * 4 * 4
    found = {row.name: (row.flops, row.calls) for row in profiler.rows()}
    assert found == {"": (2 * once, 2), "again": (2 * once, 2), "never": (0, 0)}
    profiler.reset_profile()
    assert profiler.get_total_flops() == 0
    profiler.end_profile()
    with pytest.raises(UsageError, match="start_profile"):
        profiler.get_total_flops()


def test_a_container_that_nobody_calls_has_what_its_children_did() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Attention() for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    profiler = FlopsProfiler(made := Listed())
    profiler.start_profile(ignore_list=[nn.Linear])
    made(torch.ones(BATCH, LENGTH, WIDTH))
    profiler.stop_profile()
    assert {row.name: row.flops for row in profiler.rows()} == {
        "": 2 * ATTENTION, "blocks": 2 * ATTENTION, "blocks.0": ATTENTION, "blocks.1": ATTENTION,
    }  # fmt: skip


def test_gradients_are_those_of_an_unwatched_model_and_an_error_leaves_nothing_behind() -> None:
    torch.manual_seed(0)
    made, x = model(), torch.randn(BATCH, LENGTH, WIDTH)
    made(x).sum().backward()
    wanted = [p.grad for p in made.parameters()]
    made.zero_grad()
    profiler = FlopsProfiler(made)
    profiler.start_profile()
    with set_checkpoint_early_stop(False):
        checkpoint(made, x, use_reentrant=False).sum().backward()
    profiler.stop_profile()
    # Backward counts what it recomputes in forwards, and nothing else for a module.
    assert profiler.get_total_flops() == 2 * FLOPS
    assert all(torch.equal(a, p.grad) for a, p in zip(wanted, made.parameters(), strict=True))
    profiler.start_profile()
    with pytest.raises(RuntimeError):
        made(torch.ones(1, 1, 1))
    made(x)
    profiler.stop_profile()
    assert profiler.get_total_flops() == FLOPS
    assert not made._forward_hooks


def test_the_text_names_what_computes(tmp_path, capsys) -> None:
    made, file = model(), tmp_path / "new" / "profile.txt"
    get_model_profile(made, (BATCH, LENGTH, WIDTH), output_file=str(file))
    assert capsys.readouterr().out == ""
    text = file.read_text()
    assert f"forward MACs              {macs_to_string(FLOPS // 2)}" in text
    assert "    qkv: Linear, " in text and "depth 1: Attention" in text
    get_model_profile(made, args=[torch.ones(BATCH, LENGTH, WIDTH)], detailed=False, top_modules=2)
    printed = capsys.readouterr().out
    assert "qkv" not in printed and "Attention 1.09 K, Linear 323 |" in printed
    rows = FlopsProfiler(made)
    rows.start_profile()
    rows.stop_profile()
    shallow = describe_profile(rows.rows(), 3, module_depth=1)
    assert "at step 3" in shallow and "qkv" not in shallow and "depth 2" not in shallow


def test_bad_calls_say_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"expected 'forward' or 'generate', found 'train'"):
        get_model_profile(model(), (1, 1), mode="train")
    with pytest.raises(UsageError, match="give one of them"):
        get_model_profile(model(), (1, 1), args=[1])


def test_numbers_as_words() -> None:
    assert number_to_string(1_500_000) == "1.5 M" and number_to_string(0.0123) == "12.3 m"
    assert number_to_string(2e9, units="M", precision=0) == "2000 M"
    assert flops_to_string(2e12) == "2 TFLOPS" and macs_to_string(0) == "0 MACs"
    assert params_to_string(323) == "323" and duration_to_string(0.5) == "500 ms"
