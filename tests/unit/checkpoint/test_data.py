"""The data that every reader works on: a run of a tensor is the same run, however its flat was cut."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from zeropipe.checkpoint.reshape_utils import share
from zeropipe.checkpoint.sources import Flat, Last
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
