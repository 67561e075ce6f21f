"""What is made of planned tensors is what torch makes of those in the files; nothing is read before it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zeropipe.comm.group import SELF
from zeropipe.compat.pretrained.planned import Planned
from zeropipe.runtime.zero.gather.weights import Loading
from zeropipe.tensor.weight_files import Reader

T = dict[str, torch.Tensor]


def rope(x: torch.Tensor) -> torch.Tensor:
    return x.view(2, 2, 2, x.shape[1]).transpose(1, 2).reshape(x.shape)


def filled(t: T) -> torch.Tensor:
    """A conversion that makes room first, and fills it."""
    room = torch.empty(2, 8, 6)
    for i, name in enumerate("ab"):
        room[i].copy_(t[name])
    return room


def scaled(t: T) -> torch.Tensor:
    return t["a"] * float(t["b"].max())


# Whether a rank may read its own elements alone.
MOSAICS: dict[str, Callable[[T], torch.Tensor]] = {
    "one": lambda t: t["a"][...],
    "fused": lambda t: torch.cat([torch.stack([t["a"], t["b"]]), torch.stack([t["c"], t["d"]])], dim=1),
    "chunk": lambda t: torch.chunk(t["a"], 3, dim=1)[1].contiguous(),
    "split": lambda t: torch.split(t["a"], [3, 5], dim=0)[1],
    "index": lambda t: torch.stack([t["a"], t["b"]], dim=-1)[2, :, 1],
    "squeezed": lambda t: torch.chunk(torch.stack([t["a"], t["b"]]), 2)[1].squeeze(0).unsqueeze(1),
    "flat": lambda t: t["a"].reshape(4, -1),
    "cast": lambda t: torch.cat([t["a"].to(torch.bfloat16), t["b"].to(torch.bfloat16)]).to(torch.float64),
}
CALLS: dict[str, Callable[[T], torch.Tensor]] = {
    "transposed": lambda t: t["a"].transpose(0, 1).contiguous(),
    "rope": lambda t: rope(t["a"]),
    "halves of the sum": lambda t: torch.cat(torch.chunk(t["a"] + t["b"], 2)[::-1]),
    "two dtypes": lambda t: torch.cat([t["a"], t["b"].double()]),
    "view of several": lambda t: torch.cat([t["a"], t["b"]]).view(-1),
    "filled": filled,
    "scaled by a value": scaled,
}


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[T, T, Reader]]:
    state = {name: torch.randn(8, 6) for name in "abcd"}
    save_file(state, tmp_path / "model.safetensors")
    with Reader() as reader:
        loading = Loading(reader, SELF, "test")
        yield (
            state,
            {key: Planned.stored(one, loading) for key, one in loading.opened(tmp_path).items()},
            reader,
        )


@pytest.mark.parametrize("name", [*MOSAICS, *CALLS])
def test_operations_give_what_torch_gives(both, name: str):
    state, planned, reader = both
    made = (MOSAICS | CALLS)[name](planned)
    expected = (MOSAICS | CALLS)[name](state)
    assert made.shape == expected.shape
    assert made.dtype == expected.dtype
    if name in MOSAICS:
        assert isinstance(made, Planned)
        assert made.mosaic is not None
        assert reader.nbytes == 0
    param = torch.nn.Parameter(made, requires_grad=False)  # as a library assigns it
    found = param.now() if isinstance(param, Planned) else param
    assert torch.equal(found, expected)


def test_a_call_with_several_results_reads_once(both):
    state, planned, reader = both
    halves = torch.chunk(planned["a"].transpose(0, 1), 2)
    assert reader.nbytes == 0
    for half, expected in zip(halves, torch.chunk(state["a"].t(), 2), strict=True):
        assert torch.equal(half.now(), expected)
    assert reader.nbytes == state["a"].nbytes


def test_what_does_not_fit_is_torchs_own_error(both):
    _, planned, _ = both
    with pytest.raises(RuntimeError, match="match"):
        torch.cat([planned["a"], torch.chunk(planned["b"], 2, dim=1)[0]])
    assert repr(planned["a"]) == "Planned((8, 6), torch.float32)"
