"""compressed + error = input: as real numbers, bit for bit where a buffer can hold it, and how close elsewhere."""

from __future__ import annotations

from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from zeropipe.runtime.fp16.onebit.exchange import compress_
from zeropipe.tensor.signs import packed_numel, set_signs_, sign_table

# Away from overflow of the squared norm and from subnormal numbers.
NORMAL = st.floats(2.0**-40, 2.0**40, width=32)
SIGNED = st.tuples(NORMAL, st.booleans()).map(lambda pair: -pair[0] if pair[1] else pair[0])
CLOSE = st.tuples(st.floats(2.0**-12, 2.0**12, width=32), st.booleans()).map(
    lambda pair: -pair[0] if pair[1] else pair[0]
)


def send(tensor: torch.Tensor, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What receivers compute of ``tensor + error``, and its scale; ``error`` becomes what one bit could not say."""
    table = sign_table(error.dtype, error.device)
    signs, scale = torch.empty(packed_numel(tensor.numel()), dtype=torch.uint8), torch.zeros(1)
    error += tensor
    compress_(error, [slice(0, tensor.numel())], signs, scale, table)
    sent = torch.empty_like(error)
    set_signs_(sent, signs, 0, scale[0], table)
    return sent, scale[0]


def real(tensor: torch.Tensor) -> list[Fraction]:
    return [Fraction(x) for x in tensor.tolist()]


@given(st.lists(CLOSE, min_size=1, max_size=40))
def test_in_fp64_the_identity_is_exact(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    error = torch.zeros(len(values), dtype=torch.float64)
    sent, _ = send(tensor, error)
    assert torch.equal(sent + error, tensor.double())
    assert [c + e for c, e in zip(real(sent), real(error), strict=True)] == real(tensor)


@given(st.lists(SIGNED, min_size=1, max_size=40))
def test_in_fp32_the_error_is_the_rounded_difference(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    error = torch.zeros(len(values))
    sent, norm = send(tensor, error)
    scale = Fraction(norm.item())
    for y, c, e in zip(real(tensor), real(sent), real(error), strict=True):
        gap = abs(y - c - e)
        assert gap <= abs(e) * Fraction(1, 2**24)  # half a unit in the last place of e
        if scale / 2 <= abs(y) <= 2 * scale:
            assert gap == 0


@given(st.lists(SIGNED, min_size=1, max_size=40))
def test_the_scale_keeps_the_norm(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    sent, _ = send(tensor, torch.zeros(len(values)))
    ours, theirs = sent.double().norm(), tensor.double().norm()
    assert abs(ours - theirs) <= 1e-5 * theirs  # fp32 rounding of the norm and of its root


def test_error_feedback_delivers_everything_in_the_end() -> None:
    """A constant that never fits in one bit arrives on average: the sum sent differs by one bounded error."""
    tensor = torch.linspace(-1.0, 2.0, 101)
    error, total = torch.zeros(101), torch.zeros(101, dtype=torch.float64)
    norms = []
    for _ in range(2000):
        total += send(tensor, error)[0].double()
        norms.append(error.norm().item())
    assert torch.allclose(total + error, 2000 * tensor.double(), atol=2000 * 2e-7)
    assert max(norms[1000:]) <= 1.01 * max(norms[:1000])  # bounded, not growing with the number of steps


def test_each_run_has_its_own_scale_and_padding_stays_zero() -> None:
    values = torch.cat([torch.full((5,), 1e-6), torch.full((6,), -1e3), torch.zeros(5)])
    scales = torch.zeros(2)
    compress_(
        values,
        (slice(0, 5), slice(5, 11)),
        torch.empty(2, dtype=torch.uint8),
        scales,
        sign_table(torch.float32, values.device),
    )
    assert torch.allclose(scales, torch.tensor([1e-6, 1e3]), rtol=1e-6)
    assert values[:11].abs().max() < 1e-3
    assert torch.equal(values[11:], torch.zeros(5))


def test_nothing_to_compress_and_zeros() -> None:
    assert send(torch.zeros(0), torch.zeros(0))[0].numel() == 0
    error = torch.zeros(9)
    assert torch.equal(send(torch.zeros(9), error)[0], torch.zeros(9))
    assert torch.equal(error, torch.zeros(9))
