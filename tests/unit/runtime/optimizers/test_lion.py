"""Lion follows its paper, and steps on any slice of a tensor as on the whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zeropipe.runtime.optimizers import Lion, classify


def steps(start, grads, **kw):
    p = nn.Parameter(start.clone())
    optimizer = Lion([p], **kw)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


def test_it_is_the_paper():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, generator=gen, dtype=torch.float64)
    grads = [torch.randn(5, 7, generator=gen, dtype=torch.float64) for _ in range(5)]
    ours = steps(x, grads, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
    m = torch.zeros_like(x)
    for g in grads:
        u = torch.sign(0.8 * m + 0.2 * g)
        m = 0.95 * m + 0.05 * g
        x = x - 0.01 * (u + 0.1 * x)
    torch.testing.assert_close(ours, x, rtol=1e-14, atol=1e-15)  # fp64 roundings of five steps


def test_slices_equal_the_whole_bitwise():
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(1003, generator=gen)
    grads = [torch.randn(1003, generator=gen) for _ in range(3)]
    whole = steps(x, grads, weight_decay=0.1)
    for cut in (slice(0, 1), slice(1, 501), slice(501, 1003)):
        assert torch.equal(steps(x[cut], [g[cut] for g in grads], weight_decay=0.1), whole[cut])
    assert classify(Lion([nn.Parameter(x)])) == "elementwise"


def test_missing_gradients_are_skipped_and_closure_is_used():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Lion([p, q], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (p * 2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert p.tolist() == [0.5, 0.5] and q.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bad", [{"lr": -1}, {"betas": (0.9,)}, {"weight_decay": -0.1}])
def test_bad_values_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Lion([nn.Parameter(torch.zeros(1))], **bad)
