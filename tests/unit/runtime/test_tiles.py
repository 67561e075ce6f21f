"""What is computed tile by tile is what is computed at once: values, gradients, and how little is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zeropipe.errors import UsageError
from zeropipe.runtime.sequence_parallel.data import shard_batch
from zeropipe.runtime.sequence_parallel.tiled import (
    SequenceTiledCompute,
    TiledFusedLogitsLoss,
    TiledMLP,
    sequence_tiled_compute,
)


class _Layer(nn.Module):
    def __init__(self, width: int = 8, words: int = 11, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.head = nn.Linear(width, words)
        self.up.requires_grad_(not frozen)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


def _grads(layer: _Layer, x: torch.Tensor) -> list[torch.Tensor | None]:
    return [x.grad, *(p.grad for p in layer.parameters())]


def _compare(run: Any, plain: Any, *, frozen: bool = False) -> None:
    """In fp64, where orders of additions differ by nothing that matters; a loss that others have multiplied."""
    both = []
    for compute in (run, plain):
        layer = _Layer(frozen=frozen).double()
        x = torch.randn(2, 13, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        x.requires_grad_()
        value = compute(layer, x)
        (value.square().sum() * 3.0).backward()
        both.append([value.detach(), *_grads(layer, x)])
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shards", [1, 2, 4, 13, 20])
def test_a_layer_in_tiles(shards: int, frozen: bool):
    def plain(layer: _Layer, x: torch.Tensor) -> torch.Tensor:
        return layer.mlp(x)

    def tiled(layer: _Layer, x: torch.Tensor) -> torch.Tensor:
        return TiledMLP.apply(_Layer.mlp, layer, x, shards, list(layer.parameters()))

    def general(layer: _Layer, x: torch.Tensor) -> torch.Tensor:
        return sequence_tiled_compute(
            lambda me, x: me.mlp(x), 13, shards, {"x": x}, {"me": layer}, "x", None, 1, None
        )

    def positional(layer: _Layer, x: torch.Tensor) -> torch.Tensor:
        return SequenceTiledCompute.apply(
            lambda me, x: me.mlp(x), 13, shards, ["x"], ["me"], "x", None, 1, None, x, layer
        )

    for run in (tiled, general, positional):
        _compare(run, plain, frozen=frozen)


def _labels() -> torch.Tensor:
    labels = torch.randint(11, (2, 13), generator=torch.Generator().manual_seed(6))
    labels[0, 2:9] = -100  # a tile without any label among them
    return labels


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shards", [1, 3, 4, 26])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_loss_in_tiles(reduction: str, shards: int, masked: bool):
    labels = _labels() if masked or reduction == "sum" else _labels().clamp(min=0)

    def loss(layer: _Layer, x: torch.Tensor, y: torch.Tensor, mask: Any = None) -> torch.Tensor:
        return F.cross_entropy(layer.head(x).flatten(0, -2), y.flatten(), reduction=reduction)

    def tiled(layer: _Layer, x: torch.Tensor) -> torch.Tensor:
        mask = labels != -100 if masked else None
        return TiledFusedLogitsLoss.apply(loss, layer, x, labels, mask, shards, None, reduction)

    def general(layer: _Layer, x: torch.Tensor) -> torch.Tensor:
        return sequence_tiled_compute(
            lambda me, x, y: loss(me, x, y),
            13,
            shards,
            {"x": x, "y": labels},
            {"me": layer},
            "x",
            None,
            0,
            reduction,
        )

    _compare(tiled, lambda layer, x: loss(layer, x, labels))
    if reduction == "sum":
        _compare(general, lambda layer, x: loss(layer, x, labels))


def test_only_one_tile_is_there_at_a_time():
    """What backward has kept of the layer, and the most tokens that it computes at once."""
    layer, x, sizes = _Layer(), torch.randn(1, 64, 8, requires_grad=True), []
    layer.up.register_forward_hook(lambda module, args, output: sizes.append(output.shape[1]))

    def kept(run: Any) -> int:
        found = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal found
            found += tensor.numel() if not isinstance(tensor, nn.Parameter) and tensor.shape[-1] == 24 else 0
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run()
        return found

    assert kept(lambda: layer.mlp(x)) >= 64 * 24
    assert kept(lambda: TiledMLP.apply(_Layer.mlp, layer, x, 8, None)) == 0
    assert sizes == [64] + 8 * [8]
    with torch.no_grad():
        torch.testing.assert_close(TiledMLP.apply(_Layer.mlp, layer, x, 8, None), layer.mlp(x))


def test_wrong_tiles_are_named():
    layer, x = _Layer(), torch.zeros(2, 13, 8)
    with pytest.raises(UsageError, match=r"shards.*at least 1.*0"):
        TiledMLP.apply(_Layer.mlp, layer, x, 0, None)
    with pytest.raises(UsageError, match=r"output_reduction.*'mean' or 'sum'.*'max'"):
        TiledFusedLogitsLoss.apply(_Layer.mlp, layer, x, _labels(), None, 2, None, "max")
    with pytest.raises(UsageError, match=r"TiledFusedLogitsLoss: y.*\(2, 13\).*\(2, 12\)"):
        TiledFusedLogitsLoss.apply(_Layer.mlp, layer, x, _labels()[:, 1:], None, 2)
    with pytest.raises(UsageError, match=r"'x'.*\[batch, 12, ...\]"):
        sequence_tiled_compute(_Layer.mlp, 12, 2, {"x": x}, {})


def test_what_of_a_batch_is_divided():
    batch = {
        "input_ids": torch.arange(10).view(2, 5),
        "attention_mask": torch.ones(2, 5, dtype=torch.bool),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]),
        "labels": torch.arange(10).view(2, 5),
        "positions_3d": torch.arange(30).view(3, 2, 5),
        "cu_seq_lens_q": torch.tensor([0, 3, 5]),
        "max_length_q": 3,
    }
    parts = [shard_batch(batch, rank, 2) for rank in range(2)]
    joined = {
        k: torch.cat([p[k] for p in parts], -1).tolist()
        for k in ("input_ids", "shift_labels", "position_ids")
    }
    assert joined == {
        "input_ids": [[0, 1, 2, 3, 4, 0], [5, 6, 7, 8, 9, 0]],
        "shift_labels": [[1, 2, 3, 4, -100, -100], [6, 7, 8, 9, -100, -100]],
        "position_ids": [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]],
    }
    assert not parts[1]["attention_mask"][:, -1].any() and parts[1]["attention_mask"][:, :-1].all()
    assert [tuple(p["positions_3d"].shape) for p in parts] == [(3, 2, 3)] * 2
    assert parts[0]["cu_seq_lens_q"].equal(batch["cu_seq_lens_q"]) and parts[1]["max_length_q"] == 3
    assert "labels" not in parts[0] and batch["labels"] is not None  # the user's own batch stays as it is
    with pytest.raises(UsageError, match=r"input_ids.*dict of \['x'\]"):
        shard_batch({"x": torch.zeros(2, 5)}, 0, 2)
    with pytest.raises(UsageError, match=r"labels.*one for each token, \(2, 5\).*\(2,\)"):
        shard_batch({"input_ids": torch.zeros(2, 5), "labels": torch.zeros(2)}, 0, 2)
