"""The data that every reader works on: a run of a tensor is the same run, however its flat was cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeropipe.checkpoint.reshape_utils import share
from zeropipe.checkpoint.sources import Flat, Last, Value, chosen
from zeropipe.layout.flat import FlatShards, TensorSpec

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=5)


@given(sizes, st.integers(1, 6), st.integers(1, 3), st.data())
def test_a_run_does_not_depend_on_the_cut(
    numels: list[int], shards: int, align: int, data: st.DataObject
) -> None:
    specs = tuple(TensorSpec(f"t{i}", (n,), "float32") for i, n in enumerate(numels))
    layout = FlatShards(specs, shards, align)
    values = torch.arange(float(layout.numel))
    # The last shards come without their padding, as DeepSpeed writes masters.
    parts = [{"fp32": values[slice(*layout.shard_range(shard))]} for shard in range(shards)]
    flat = Flat.of("flat", 0, 0, layout, parts, {})
    index = data.draw(st.integers(0, len(numels) - 1))
    start = data.draw(st.integers(0, numels[index]))
    stop = data.draw(st.integers(start, numels[index]))
    first = layout.offsets[index]
    assert torch.equal(flat.run(f"t{index}", "fp32", start, stop), values[first + start : first + stop])
    assert torch.equal(flat.whole(f"t{index}", "fp32"), values[first : first + numels[index]])


@given(st.integers(1, 12), st.integers(1, 12))
def test_everything_is_shared_out_in_order_and_nobody_goes_without(size: int, count: int) -> None:
    runs = share(range(size), count)
    assert len(runs) == count and all(runs)
    assert [run[0] for run in runs] == sorted(run[0] for run in runs)
    assert {item for run in runs for item in run} == set(range(size))
    if size % count == 0:
        assert [item for run in runs for item in run] == list(range(size))
    if count % size == 0:
        assert runs == [[i // (count // size)] for i in range(count)]


def test_the_tensor_read_last_is_the_only_one_that_is_kept() -> None:
    last, read = Last(), list[str]()

    def value(name: str) -> torch.Tensor:
        assert last._kept is None
        read.append(name)
        return torch.ones(1)

    for name in "aabba":
        last.get(name, lambda name=name: value(name))
    assert read == ["a", "b", "a"]


@given(st.lists(st.integers(0, 4), max_size=3), st.data())
def test_a_value_is_a_flat_of_one_tensor(shape: list[int], data: st.DataObject) -> None:
    values = torch.randn(shape)
    value = Value.of("a", values, "param", "file")
    weight = chosen("a", value, None)
    assert weight is not None and torch.equal(weight.read(), values)
    start = data.draw(st.integers(0, values.numel()))
    stop = data.draw(st.integers(start, values.numel()))
    out = torch.empty(stop - start, dtype=torch.bfloat16)
    assert torch.equal(weight.run(start, stop), values.reshape(-1)[start:stop])
    assert torch.equal(weight.run(start, stop, out), values.reshape(-1)[start:stop].bfloat16())


MASTER = Flat.of(
    "group0", 0, 0, FlatShards((TensorSpec("a", (2,), "float32"),), 1), [{"fp32": torch.ones(2)}], {}
)


@pytest.mark.parametrize(
    ("kind", "dtype", "from_module"),
    [
        ("param", None, False),  # the master has more bits
        ("param", torch.float32, False),
        ("param", torch.bfloat16, True),  # as it is asked for already
        ("computed", None, True),  # a hook's: no rounded master
    ],
)
def test_a_tensor_is_read_from_its_master_or_as_it_stands(
    kind: str, dtype: torch.dtype | None, from_module: bool
) -> None:
    value = Value.of("a", torch.zeros(2, dtype=torch.bfloat16), kind, "file")
    found = chosen("a", value, MASTER, dtype)
    assert found is not None and (found.value is value) is from_module
    assert found.read().tolist() == ([0, 0] if from_module else [1, 1])
    assert chosen("a", None, None) is None


def test_a_sparse_buffer_is_read_whole() -> None:
    weight = chosen("a", Value.of("a", torch.eye(3).to_sparse(), "buffer", "file"), None)
    assert weight is not None and torch.equal(weight.read().to_dense(), torch.eye(3))
