"""Random layouts, with the shapes that break sharding: scalars, empty tensors, more shards than elements."""

from __future__ import annotations

from hypothesis import strategies as st

from zeropipe.layout.flat import FlatShards, TensorSpec

DTYPES = ("float32", "bfloat16", "int64")
shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)  # () is a scalar, any 0 is an empty tensor


@st.composite
def layouts(draw: st.DrawFn, max_tensors: int = 8, max_shards: int = 9) -> FlatShards:
    found = draw(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=max_tensors))
    tensors = tuple(TensorSpec(f"t{i}", shape, dtype) for i, (shape, dtype) in enumerate(found))
    return FlatShards(tensors, draw(st.integers(1, max_shards)), draw(st.sampled_from([1, 2, 3, 8, 128])))
