"""One bit per element: every length, every offset, every value, against the obvious definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeropipe.tensor import signs
from zeropipe.tensor.signs import add_signs_, pack_signs, packed_numel, set_signs_, sign_table

FLOATS = st.floats(width=32, allow_nan=False)


def reference_pack(values: list[float]) -> list[int]:
    """Bit i % 8 of byte i // 8 is set where the sign bit of element i is."""
    negative = torch.signbit(torch.tensor(values, dtype=torch.float64)).tolist()
    return [
        sum(1 << k for k, bit in enumerate(negative[at : at + 8]) if bit) for at in range(0, len(values), 8)
    ]


@given(st.lists(FLOATS, max_size=70))
def test_packing_is_the_sign_bit_of_each_element(values: list[float]) -> None:
    packed = pack_signs(torch.tensor(values, dtype=torch.float32))
    assert packed.tolist() == reference_pack(values)
    assert packed.numel() == packed_numel(len(values))


@given(st.lists(FLOATS, min_size=1, max_size=70), st.data())
def test_any_part_of_the_signs_can_be_read(values: list[float], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(values)))
    stop = data.draw(st.integers(start, len(values)))
    tensor = torch.tensor(values, dtype=torch.float32)
    table = sign_table(torch.float32, tensor.device)
    target = torch.full((stop - start,), 7.0)
    set_signs_(target, pack_signs(tensor), start, torch.tensor(0.5), table)
    expected = torch.where(torch.signbit(tensor), -0.5, 0.5)[start:stop]
    assert torch.equal(target, expected)
    add_signs_(target, pack_signs(tensor), start, torch.tensor(0.25), table)
    assert torch.equal(target, expected * 1.5)


@pytest.mark.parametrize("numel", [8 * 1024, 8 * 1024 + 3, 5 * 1024 + 1])
@pytest.mark.parametrize("start", [0, 1, 7, 1023])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, numel: int, start: int) -> None:
    monkeypatch.setattr(signs, "_CHUNK", 1024)
    tensor = torch.randn(numel, generator=torch.Generator().manual_seed(3))
    packed = pack_signs(tensor)
    assert packed.tolist() == reference_pack(tensor.tolist())
    target = torch.zeros(numel - start)
    add_signs_(target, packed, start, torch.tensor(2.0), sign_table(torch.float32, tensor.device))
    assert torch.equal(target, torch.where(tensor < 0, -2.0, 2.0)[start:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_pack_alike(dtype: torch.dtype) -> None:
    tensor = torch.tensor([0.0, -0.0, 1.5, -2.0, float("inf"), -float("inf"), 1e-7, -1e-7, -3.0], dtype=dtype)
    assert pack_signs(tensor).tolist() == reference_pack(tensor.tolist())
