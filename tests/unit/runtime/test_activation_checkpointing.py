"""Checkpointed layers give the same bits as plain ones, dropout of either kind included."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from zeropipe import checkpointing
from zeropipe.errors import UsageError


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(checkpointing, "SHARED", checkpointing.Checkpointing())


def run(wrap):
    torch.manual_seed(0)
    checkpointing.model_parallel_cuda_manual_seed(11)
    layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
    x = torch.randn(4, 16, requires_grad=True)
    calls = []

    def block(layer, h, scale):
        calls.append(1)
        h = nn.functional.dropout(torch.tanh(layer(h)), 0.5) * scale
        with checkpointing.get_cuda_rng_tracker().fork():
            return nn.functional.dropout(h, 0.3)

    h = x
    for layer in layers:
        h = wrap(block, layer, h, 2.0)
    drawn = torch.rand(3)
    h.square().sum().backward()
    after = (torch.rand(3), checkpointing.get_cuda_rng_tracker().get_states())
    return [
        x.grad,
        *(p.grad for p in layers.parameters()),
        h.detach(),
        drawn,
        after[0],
        *after[1].values(),
    ], len(calls)


@pytest.mark.parametrize("in_cpu", [False, True])
@pytest.mark.parametrize("wrap", [checkpointing.checkpoint, checkpointing.non_reentrant_checkpoint])
def test_same_bits_and_recomputed_once(wrap, in_cpu):
    plain, calls = run(lambda f, *a: f(*a))
    checkpointing.configure(checkpoint_in_cpu=in_cpu)
    ours, recomputed = run(wrap)
    assert (calls, recomputed) == (3, 6)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def test_reentrant_way_replays_too():
    plain, _ = run(lambda f, *a: f(*a))
    ours, recomputed = run(lambda f, *a: checkpointing.checkpoint(f, *a, use_reentrant=True))
    assert recomputed == 6
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def test_saved_inputs_wait_in_cpu_memory(monkeypatch):
    asked = []
    real = checkpointing.save_on_cpu
    monkeypatch.setattr(checkpointing, "save_on_cpu", lambda **kw: asked.append(kw) or real(**kw))
    x = torch.randn(2, 2, requires_grad=True)
    checkpointing.checkpoint(torch.tanh, x).sum().backward()
    assert asked == []
    checkpointing.configure(deepspeed_config={"activation_checkpointing": {"cpu_checkpointing": True}})
    checkpointing.checkpoint(torch.tanh, x).sum().backward()
    assert asked == [{"pin_memory": torch.cuda.is_available()}]


def test_configure_says_once_what_has_no_effect(caplog):
    assert not checkpointing.is_configured()
    with caplog.at_level(logging.WARNING, logger="zeropipe"):
        checkpointing.configure(mpu_=None, partition_activations=False, profile=False)
        assert caplog.records == []
        for _ in range(2):
            checkpointing.configure(partition_activations=True)
    assert [r.getMessage() for r in caplog.records] == [
        "activation checkpointing: partition_activations has no effect: there is no model-parallel group to share "
        "them with"
    ]
    assert checkpointing.is_configured()
    checkpointing.reset()
    assert not checkpointing.is_configured()


def test_model_parallel_seeds_differ_by_rank_and_the_default_does_not():
    draws = []
    for rank in (0, 1):
        checkpointing.configure(mpu_=SimpleNamespace(get_model_parallel_rank=lambda rank=rank: rank))
        checkpointing.model_parallel_cuda_manual_seed(5)
        with checkpointing.get_cuda_rng_tracker().fork():
            inside = torch.rand(4)
        draws.append((inside, torch.rand(4)))
    assert not torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])


def test_tracker_refuses_reuse_and_unknown_names():
    tracker = checkpointing.CudaRNGStatesTracker()
    before = torch.get_rng_state()
    tracker.add("a", 1)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(UsageError, match="'a' exists"):
        tracker.add("a", 2)
    with pytest.raises(UsageError, match="seed 1 is that of"):
        tracker.add("b", 1)
    with pytest.raises(UsageError, match="no random state 'model-parallel-rng'"), tracker.fork():
        pass


def test_an_error_inside_fork_puts_the_default_state_back():
    tracker = checkpointing.CudaRNGStatesTracker()
    tracker.add("a", 1)
    before = torch.get_rng_state()

    def fails():
        with tracker.fork("a"):
            torch.rand(1)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert torch.equal(torch.get_rng_state(), before)
