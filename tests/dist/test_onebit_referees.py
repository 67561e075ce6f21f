"""The compressed optimizers against the papers' formulas, written out again in fp64, all ranks in one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.dist import onebit_tasks as problem
from tests.helpers.pool import Pools
from zeropipe.layout.flat import FlatShards, TensorSpec
from zeropipe.runtime.fp16.onebit.exchange import ALIGN

# fp32 against fp64 over a few steps: each step rounds a few times, and divides by a small root.
FEW_STEPS = 3e-5
GROUPS = ((range(3), 0.05, 0.01), (range(3, 6), 0.02, 0.0))  # parameters, learning rate, weight decay
ZERO_ONE = {"var_freeze_step": 4, "var_update_scaler": 2, "local_step_scaler": 3, "local_step_clipper": 4}


def run(rank: int, size: int, name: str, options: dict[str, Any], steps: int) -> list[torch.Tensor]:
    params = problem.make_params()
    optimizer = problem.build(name, params, **options)
    for step in range(steps):
        problem.set_gradients(params, rank, step)
        optimizer.step()
    return problem.copies(params)


def own_gradients(params: list[torch.Tensor], rank: int, step: int) -> list[torch.Tensor]:
    """What ``problem.set_gradients`` gives a rank, at fp64 parameters."""
    at_zero = problem.gradients([torch.zeros_like(p, dtype=torch.float32) for p in params], rank, step)
    return [g.double() + p for g, p in zip(at_zero, params, strict=True)]


def compression(layout: FlatShards) -> Callable[[torch.Tensor], torch.Tensor]:
    """scale * sign for each run of one tensor inside one shard of the flat buffer."""
    runs = []
    for shard in range(layout.num_shards):
        base = layout.shard_range(shard)[0]
        runs += [(base + p.offset, base + p.offset + p.numel) for p in layout.pieces(shard)]

    def bits(y: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(y)
        for a, b in runs:
            out[a:b] = y[a:b].norm() / math.sqrt(b - a) * torch.where(y[a:b] < 0, -1.0, 1.0)
        return out

    return bits


def referee(size: int, steps: int, freeze: int) -> list[torch.Tensor]:
    """1-bit Adam over all ranks in one process, in fp64, straight from Algorithm 1."""
    params = [p.detach().double() for p in problem.make_params()]
    for group in (range(3), range(3, 6)):
        specs = [TensorSpec(str(i), tuple(params[i].shape), "float64") for i in group]
        layout = FlatShards(tuple(specs), size, ALIGN)
        numel = layout.numel
        m, v = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
        worker = [torch.zeros(numel, dtype=torch.float64) for _ in range(size)]
        server = torch.zeros(numel, dtype=torch.float64)
        lr, decay = (0.05, 0.01) if group.start == 0 else (0.02, 0.0)
        bits = compression(layout)
        x = torch.cat([params[i].reshape(-1) for i in group])
        for step in range(steps):
            shaped = [
                x[a:b].view(params[i].shape)
                for i, (a, b) in zip(group, map(layout.tensor_range, range(3)), strict=True)
            ]
            whole = [shaped[i - group.start] if i in group else params[i] for i in range(6)]
            gs = [
                torch.cat([g.reshape(-1) for i, g in enumerate(own_gradients(whole, r, step)) if i in group])
                for r in range(size)
            ]
            if step < freeze:
                g = torch.stack(gs).mean(0)
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            else:
                sent = torch.zeros_like(m)
                for rank in range(size):
                    y = 0.9 * m + 0.1 * gs[rank] + worker[rank]
                    worker[rank] = y - bits(y)
                    sent += bits(y) / size
                y = sent + server
                server, m = y - bits(y), bits(y)
            second = 1 - 0.999 ** min(step + 1, freeze)
            x = x - lr * (m / (1 - 0.9 ** (step + 1)) / ((v / second).sqrt() + 1e-8) + decay * x)
        for i, (a, b) in zip(group, map(layout.tensor_range, range(3)), strict=True):
            params[i] = x[a:b].view(params[i].shape)
    return params


@pytest.mark.parametrize("size", [2, 3])
def test_compression_against_the_fp64_referee(pool: Pools, size: int) -> None:
    found = pool(size).run(run, "adam", {"freeze_step": 3}, 7)
    expected = referee(size, 7, 3)
    for ours, theirs in zip(found[0], expected, strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=FEW_STEPS, atol=FEW_STEPS)
    dense = pool(size).run(run, "adam", {"freeze_step": 100}, 7)
    assert (dense[0][2] - found[0][2]).abs().max() > 100 * FEW_STEPS  # the referee saw compression, not Adam


# Bounds narrow enough that each of them is met within a few steps.
LAMB = {"freeze_step": 4, "min_coeff": 0.05, "max_coeff": 2.0, "factor_max": 1.3, "factor_min": 0.8}


def lamb_referee(size: int, steps: int, freeze: int, corrected: bool) -> tuple[list[torch.Tensor], set[str]]:
    """1-bit LAMB from Algorithms 1 and 2 of the paper, tensor by tensor, with LAMB's bounds; also: what was met.

    With one rank nothing is compressed: the recursion alone.
    """
    params = [p.detach().double() for p in problem.make_params()]
    zeros = [torch.zeros_like(p) for p in params]
    m, v, fresh = list(zeros), list(zeros), list(zeros)
    average, last = [0.0] * 6, [1.0] * 6
    errors = [Feedback(params, group, size) for group, _, _ in GROUPS]
    met: set[str] = set()
    for step in range(1, steps + 1):
        gs = [own_gradients(params, rank, step - 1) for rank in range(size)]
        mean = [torch.stack(every).mean(0) for every in zip(*gs, strict=True)]
        dense = step <= freeze
        first = 1 - 0.9**step if corrected else 1.0
        second = 1 - 0.999 ** min(step, freeze) if corrected else 1.0
        third = 1 - 0.999**step if corrected else 1.0
        before = list(m)
        if dense:
            m = [0.9 * a + 0.1 * g for a, g in zip(m, mean, strict=True)]
            v = [0.999 * a + 0.001 * g * g for a, g in zip(v, mean, strict=True)]
            fresh = list(v)
        else:
            own = [[0.9 * a + 0.1 * g for a, g in zip(m, rank, strict=True)] for rank in gs]
            m = [t for feedback in errors for t in feedback.average(own)]
        for i, lr, decay in ((i, lr, decay) for group, lr, decay in GROUPS for i in group):
            x = params[i]
            if not x.numel():
                continue
            below = (v[i] / second).sqrt() + 1e-8
            adam = m[i] / first / below
            d = adam + decay * x
            if dense:
                ratio = float(x.norm() / d.norm())
                met |= {"min_coeff"} if ratio < 0.05 else {"max_coeff"} if ratio > 2.0 else set()
                c = min(max(ratio, 0.05), 2.0)
                average[i] = 0.9 * average[i] + 0.1 * c
            else:
                rebuilt = (m[i] - 0.9 * before[i]) / 0.1
                fresh[i] = 0.999 * fresh[i] + 0.001 * rebuilt**2
                r = float((below / ((fresh[i] / third).sqrt() + 1e-8)).max())
                share = min(1.0, float(adam.norm() / d.norm()))
                r = r * share + 1 - share
                met |= {"factor_min"} if r < 0.8 else {"factor_max"} if r > 1.3 else set()
                r = min(max(r, 0.8), 1.3)
                met |= {"factor_threshold"} if abs(r / last[i] - 1) > 0.1 else set()
                last[i] = r = min(max(r, 0.9 * last[i]), 1.1 * last[i])
                c = average[i] / (1 - 0.9**freeze) * r
            params[i] = x - lr * c * d
    return params, met


class Feedback:
    """The compressed average of one param group, with all ranks' errors."""

    def __init__(self, params: list[torch.Tensor], group: range, size: int) -> None:
        self.group, self.shapes = group, [tuple(params[i].shape) for i in group]
        specs = [TensorSpec(str(i), shape, "float64") for i, shape in zip(group, self.shapes, strict=True)]
        self.layout = FlatShards(tuple(specs), size, ALIGN)
        self.bits = compression(self.layout) if size > 1 else torch.clone
        self.worker = [torch.zeros(self.layout.numel, dtype=torch.float64) for _ in range(size)]
        self.server = torch.zeros(self.layout.numel, dtype=torch.float64)

    def scale(self, factor: float) -> None:
        self.worker = [error * factor for error in self.worker]
        self.server = self.server * factor

    def average(self, every: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        sent = torch.zeros_like(self.server)
        for rank, tensors in enumerate(every):
            y = torch.cat([tensors[i].reshape(-1) for i in self.group]) + self.worker[rank]
            self.worker[rank] = y - self.bits(y)
            sent += self.bits(y) / len(every)
        y = sent + self.server
        self.server = y - self.bits(y)
        ranges = map(self.layout.tensor_range, range(len(self.shapes)))
        return [self.bits(y)[a:b].view(shape) for (a, b), shape in zip(ranges, self.shapes, strict=True)]


@pytest.mark.parametrize("corrected", [True, False])
def test_the_recursion_of_1_bit_lamb_where_nothing_is_compressed(corrected: bool) -> None:
    found = run(0, 1, "lamb", {**LAMB, "bias_correction": corrected}, 16)
    expected, met = lamb_referee(1, 16, 4, corrected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=FEW_STEPS, atol=FEW_STEPS)
    # The referee went through the bounds. Uncorrected, a fresh variance still grows when the other is frozen.
    assert {"factor_max" if corrected else "factor_min", "factor_threshold"} <= met


@pytest.mark.parametrize("size", [2, 3])
def test_1_bit_lamb_against_the_fp64_referee(pool: Pools, size: int) -> None:
    found = pool(size).run(run, "lamb", LAMB, 9)
    expected, met = lamb_referee(size, 9, 4, True)
    for ours, theirs in zip(found[0], expected, strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=FEW_STEPS, atol=FEW_STEPS)
    assert met


def zero_one_referee(size: int, steps: int) -> list[list[torch.Tensor]]:
    """0/1 Adam from Algorithm 1 with ZERO_ONE's rules: each rank's parameters after ``steps`` steps.

    Variance at steps 1 to 3, compressed momentum from 4 to 7, then local steps with exchanges at 9 and 13.
    """
    start = [p.detach().double() for p in problem.make_params()]
    params = [list(start) for _ in range(size)]
    zeros = [torch.zeros_like(p) for p in start]
    ms, us, v, ys = [list(zeros) for _ in params], [list(zeros) for _ in params], list(zeros), list(start)
    errors = [Feedback(start, group, size) for group, _, _ in GROUPS]
    total = decayed = 0.0
    for step in range(1, steps + 1):
        gs = [own_gradients(x, rank, step - 1) for rank, x in enumerate(params)]
        first = 1 - 0.9**step
        if step <= 3:
            mean = [torch.stack(every).mean(0) for every in zip(*gs, strict=True)]
            v = [0.999 * a + 0.001 * g * g for a, g in zip(v, mean, strict=True)]
            gs = [mean] * size
        ms = [[0.9 * a + 0.1 * b for a, b in zip(m, g, strict=True)] for m, g in zip(ms, gs, strict=True)]
        if 4 <= step <= 7:
            ms = [[t for feedback in errors for t in feedback.average(ms)]] * size
        if step == 8:
            ys = list(params[0])
            for feedback, (_, lr, _) in zip(errors, GROUPS, strict=True):
                feedback.scale(lr / first)
        total, decayed = total + 1 / first, decayed + 1
        rates = [(lr, decay) for group, lr, decay in GROUPS for _ in group]
        roots = [(a / (1 - 0.999 ** min(step, 3))).sqrt() + 1e-8 for a in v]
        if step < 8:
            params = [
                [x - r * (a / first / b + d * x) for x, a, b, (r, d) in zip(xs, m, roots, rates, strict=True)]
                for xs, m in zip(params, ms, strict=True)
            ]
            total = decayed = 0.0
            continue
        us = [
            [u + r / first * a for u, a, (r, _) in zip(own, m, rates, strict=True)]
            for own, m in zip(us, ms, strict=True)
        ]
        if step in (9, 13):
            us = [[t for feedback in errors for t in feedback.average(us)]] * size
        params = [
            [y - u / b - d * r * decayed * y for y, u, b, (r, d) in zip(ys, own, roots, rates, strict=True)]
            for own in us
        ]
        if step in (9, 13):
            ms = [[u / (r * total) for u, (r, _) in zip(us[0], rates, strict=True)]] * size
            us, ys = [list(zeros) for _ in params], list(params[0])
            total = decayed = 0.0
    return params


def test_intervals_of_local_steps_where_nothing_is_compressed() -> None:
    found = run(0, 1, "zero-one", ZERO_ONE, 16)
    for ours, theirs in zip(found, zero_one_referee(1, 16)[0], strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=FEW_STEPS, atol=FEW_STEPS)


@pytest.mark.parametrize("steps", [7, 9, 12, 13])
def test_0_1_adam_against_the_fp64_referee(pool: Pools, steps: int) -> None:
    """The end of the steps of bits, an exchange of updates, the middle of an interval of four, its end."""
    found = pool(2).run(run, "zero-one", ZERO_ONE, steps)
    expected = zero_one_referee(2, steps)
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a.double(), b, rtol=FEW_STEPS, atol=FEW_STEPS)
    apart = any(not torch.equal(a, b) for a, b in zip(*expected, strict=True))
    assert apart is (steps == 12)
