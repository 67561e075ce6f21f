"""The judge must itself be judged: a comparison that cannot fail proves nothing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from tests.helpers.data import global_batches, gpt_batch, mlp_batch, token_batch
from tests.helpers.models import MLP, NastyModel, TinyGPT, build
from tests.helpers.referee import assert_bitwise, assert_within_referee, train_plain, weights_of

CASES = {
    "nasty": (partial(build, NastyModel), token_batch),
    "nasty-bf16": (partial(build, NastyModel, half=torch.bfloat16), token_batch),
    "mlp": (partial(build, MLP), mlp_batch),
    "gpt": (partial(build, TinyGPT), gpt_batch),
}
adam = partial(torch.optim.Adam, lr=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_models_are_deterministic_and_leave_the_seed_alone(case: str) -> None:
    factory, make = CASES[case]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = factory(), factory()
    assert torch.equal(torch.get_rng_state(), state)
    assert_bitwise(weights_of(first), weights_of(second))
    assert_bitwise(make(1, 2, 3), make(1, 2, 3))
    assert not torch.equal(make(1, 2, 3)[0], make(1, 3, 2)[0])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_training_lowers_the_loss_and_fp32_is_near_fp64(case: str, clip: float | None) -> None:
    factory, make = CASES[case]
    batches = partial(_same_batches, make)
    exact = train_plain(factory, batches, adam, 8, clip=clip)
    plain = train_plain(factory, batches, adam, 8, clip=clip, dtype=None)
    assert exact.losses[-1] < exact.losses[0]
    assert len(exact.grad_norms) == 8
    assert all(w.dtype == torch.float64 for w in exact.weights.values())
    assert_within_referee(plain.weights, plain.weights, exact.weights)


def _same_batches(make: object, step: int) -> list[tuple[torch.Tensor, ...]]:
    return global_batches(make, 0, world=2, micros=2)


def test_the_nasty_model_is_nasty() -> None:
    model = build(NastyModel, half=torch.bfloat16)
    model(*token_batch(0)).backward()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    largest = max(sizes.values())
    assert largest > sum(sizes.values()) - largest
    assert 0 in sizes.values()
    assert model.scale.shape == ()
    assert model.head.weight is model.embed.weight
    assert model.dead.weight.grad is None
    assert model.empty.grad is not None
    assert not model.frozen.weight.requires_grad
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    model(*token_batch(0), wake_dead=True).backward()
    assert model.dead.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_ulp_is_a_difference_and_is_counted(dtype: torch.dtype) -> None:
    a = torch.ones(2, 3, dtype=dtype)
    b = a.clone()
    assert_bitwise({"w": [a]}, {"w": [b]})
    b[1, 2] = 1 + torch.finfo(dtype).eps
    with pytest.raises(
        AssertionError, match=r"\['w'\]\[0\]: 1 of 6 elements differ, first at \(1, 2\).*1 ulp"
    ):
        assert_bitwise({"w": [a]}, {"w": [b]})


def test_ulps_are_counted_across_zero() -> None:
    tiny = torch.tensor([1e-45])
    with pytest.raises(AssertionError, match="2 ulp there"):
        assert_bitwise(tiny, -tiny)


@pytest.mark.parametrize(
    ("ours", "expected", "why"),
    [
        (torch.tensor(0.0), torch.tensor(-0.0), "0.0, expected -0.0"),
        (torch.tensor(float("nan")), torch.tensor(1.0), "nan"),
        (torch.ones(2), torch.ones(3), "shape|\\(2,\\)"),
        (torch.ones(2), torch.ones(2).double(), "float64"),
        ({"a": 1}, {"a": 1, "b": 2}, "'b'.*missing"),
        ({"a": 1, "b": 2}, {"a": 1}, "'b'.*not expected"),
        ([1, 2], [1], "2 items"),
        (0.1 + 0.2, 0.3, "0.3"),
        (True, 1, "True"),
        (torch.tensor([True]), torch.tensor([False]), "differ"),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 3j]), "first at \\(0,\\)"),
        (None, torch.ones(1), "None"),
    ],
)
def test_differences_of_every_kind_are_found(ours: object, expected: object, why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        assert_bitwise(ours, expected)


def test_equal_nans_empty_and_strided_tensors_are_equal() -> None:
    nan = torch.tensor([float("nan"), float("inf")])
    assert_bitwise(nan, nan.clone())
    assert_bitwise(torch.empty(0, 3), torch.empty(0, 3))
    matrix = torch.arange(6.0).view(2, 3)
    assert_bitwise(matrix.t(), matrix.t().contiguous())


def test_the_referee_refuses_a_larger_error() -> None:
    exact = {"w": torch.ones(100, dtype=torch.float64), "b": torch.zeros(3, dtype=torch.float64)}
    plain = {"w": torch.ones(100) * (1 + 1e-5), "b": torch.zeros(3)}
    assert_within_referee({"w": torch.ones(100) * (1 - 1.5e-5), "b": torch.zeros(3)}, plain, exact)
    with pytest.raises(AssertionError, match="w: error"):
        assert_within_referee({"w": torch.ones(100) * (1 - 3e-5), "b": torch.zeros(3)}, plain, exact)
    with pytest.raises(AssertionError, match="w: error nan"):
        assert_within_referee({"w": torch.full((100,), float("nan")), "b": torch.zeros(3)}, plain, exact)


def test_a_lucky_plain_run_still_allows_rounding() -> None:
    exact = {"w": torch.full((4,), 1 / 3, dtype=torch.float64)}
    rounded = {"w": exact["w"].float()}
    lucky = {"w": exact["w"].clone()}
    assert_within_referee(rounded, lucky, exact)


def test_accumulated_micro_batches_equal_one_large_batch_in_fp64() -> None:
    def large(step: int) -> list[tuple[torch.Tensor, ...]]:
        parts = global_batches(mlp_batch, step, world=2, micros=2)
        return [tuple(torch.cat(x) for x in zip(*parts, strict=True))]

    many = train_plain(partial(build, MLP), partial(global_batches, mlp_batch, world=2, micros=2), adam, 3)
    one = train_plain(partial(build, MLP), large, adam, 3)
    for name, weight in many.weights.items():
        assert (weight - one.weights[name]).abs().max() < 1e-12  # fp64 rounding after three Adam steps


def test_weights_name_tied_parameters_once() -> None:
    names = set(weights_of(build(NastyModel)))
    assert "embed.weight" in names
    assert "head.weight" not in names
    assert isinstance(build(NastyModel).head, nn.Linear)
