"""Optimizers by name do what the name says, and only those that can step on shards are let through."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from zeropipe.errors import ConfigError, UnsupportedOptimizerError
from zeropipe.runtime import optimizers as zo
from zeropipe.runtime.optimizers import build_optimizer, classify, require_shardable


def params(*shapes):
    return [nn.Parameter(torch.ones(s)) for s in (shapes or [(2, 3), (3,)])]


@pytest.mark.parametrize(
    ("name", "cls", "weight_decay"),
    [
        ("Adam", torch.optim.AdamW, 0.0),
        ("adamw", torch.optim.AdamW, 0.0),
        ("FusedAdam", zo.FusedAdam, 0.0),
        ("CPUAdam", zo.DeepSpeedCPUAdam, 0.0),
        ("deepspeedcpuadam", zo.DeepSpeedCPUAdam, 0.0),
        ("SGD", torch.optim.SGD, 0.0),
        ("Adagrad", torch.optim.Adagrad, 0.0),
        ("CPUAdagrad", zo.DeepSpeedCPUAdagrad, 0.0),
        ("LION", zo.FusedLion, 0.0),
        ("FusedLion", zo.FusedLion, 0.0),
        ("CPULion", zo.DeepSpeedCPULion, 0.0),
        ("Lamb", zo.FusedLamb, 0.0),
        ("FusedLamb", zo.FusedLamb, 0.0),
        ("Muon", zo.Muon, 0.0),
        ("nadam", torch.optim.NAdam, 0.0),
        ("RMSprop", torch.optim.RMSprop, 0.0),
    ],
)
def test_names(name, cls, weight_decay):
    given = params()
    optimizer = build_optimizer(name, {"lr": 0.125}, given)
    assert type(optimizer) is cls
    assert all(g["lr"] == 0.125 and g["weight_decay"] == weight_decay for g in optimizer.param_groups)
    for p in given:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all((p < 1).all() for p in given)
    assert require_shardable(optimizer, 2) in ("elementwise", "shard_aware")


@pytest.mark.parametrize(
    ("extra", "decoupled", "weight_decay"),
    [
        ({}, True, 0.0),
        ({"adam_w_mode": False}, False, 0.0),
        ({"torch_adam": True}, True, 0.01),
        ({"torch_adam": True, "adam_w_mode": False, "weight_decay": 0.5}, False, 0.5),
    ],
)
def test_adam_keys(extra, decoupled, weight_decay):
    (group,) = build_optimizer("Adam", extra, params()).param_groups
    assert group["decoupled_weight_decay"] is decoupled
    assert group["weight_decay"] == weight_decay


def test_fused_where_the_device_has_it_and_the_user_did_not_choose():
    assert build_optimizer("AdamW", {}, params()).param_groups[0]["fused"] is True
    assert build_optimizer("SGD", {}, params()).param_groups[0]["fused"] is True
    assert build_optimizer("SGD", {}, params(), device="cuda").param_groups[0]["fused"] is True
    assert not build_optimizer("AdamW", {"foreach": True}, params()).param_groups[0]["fused"]
    assert not build_optimizer("AdamW", {}, params(), device="meta").param_groups[0]["fused"]
    assert "fused" not in build_optimizer("RMSprop", {}, params()).param_groups[0]


def test_auto_counts_as_absent():
    assert build_optimizer("AdamW", {"lr": "auto", "eps": 1e-6}, params()).param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("AdmW", {}, r"optimizer\.type.*'AdmW'.*write 'AdamW'"),
        ("Shampooish", {}, "use one of"),
        ("AdamW", {"weight_deacy": 0.1}, r"params\.weight_deacy.*AdamW has no.*write 'weight_decay'"),
        ("Lamb", {"beta": 1}, "write 'betas'"),
        ("SGD", {"lr": -1.0}, r"SGD refuses.*Invalid learning rate"),
        ("Adam", {"bias_correction": False}, "bias_correction=False"),
        ("FusedAdam", {"bias_correction": False}, "bias_correction=False"),
        ("Lamb", {"max_grad_norm": 1.0}, "gradient_clipping"),
        ("FusedLamb", {"amsgrad": True}, "amsgrad"),
        ("CPUAdagrad", {"amsgrad": True}, "amsgrad"),
        ("Muon", {"adjust_lr_fn": "none"}, "match_rms_adamw"),
    ],
)
def test_mistakes_name_the_way_out(name, given, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(name, given, params())


def test_compressed_optimizers_are_found_by_path_alone(monkeypatch):
    module = type(sys)("zeropipe.runtime.fp16.onebit.adam")

    class OnebitAdam(torch.optim.SGD):
        pass

    module.OnebitAdam = OnebitAdam
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert type(build_optimizer("OneBitAdam", {"lr": 0.1}, params())) is OnebitAdam
    del module.OnebitAdam
    with pytest.raises(ConfigError, match="not part of this installation"):
        build_optimizer("OneBitAdam", {}, params())


@pytest.mark.parametrize(
    "cls",
    [
        zo.FusedAdam,
        zo.DeepSpeedCPUAdam,
        zo.FusedLion,
        zo.DeepSpeedCPULion,
        zo.DeepSpeedCPUAdagrad,
        zo.FusedLamb,
    ],
)
def test_groups_are_used_in_place(cls):
    theirs = torch.optim.AdamW([{"params": params(), "lr": 0.5}, {"params": params(), "name": "b"}], lr=0.25)
    scheduler = torch.optim.lr_scheduler.LambdaLR(theirs, lambda step: 0.5**step)
    ours = cls(theirs.param_groups, lr=1e-3)
    assert all(a is b for a, b in zip(ours.param_groups, theirs.param_groups, strict=True))
    if isinstance(ours, torch.optim.Adam | torch.optim.Adagrad):
        assert all(group["fused"] for group in ours.param_groups)
    for group in ours.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    theirs.step()
    ours.step()
    scheduler.step()
    assert [g["lr"] for g in ours.param_groups] == [0.25, 0.125]


def test_adam_mode_wins_over_the_groups_of_another_optimizer():
    p = params((4,))
    theirs = torch.optim.AdamW(p, lr=0.1, weight_decay=0.5)
    ours = zo.DeepSpeedCPUAdam(theirs.param_groups, adamw_mode=False)
    reference = nn.Parameter(torch.ones(4))
    plain = torch.optim.Adam([reference], lr=0.1, weight_decay=0.5, fused=True)
    p[0].grad, reference.grad = torch.full((4,), 0.3), torch.full((4,), 0.3)
    ours.step()
    plain.step()
    assert torch.equal(p[0], reference)


def test_generators_are_accepted_everywhere():
    model = nn.Linear(3, 2)
    assert len(zo.FusedAdam(model.parameters()).param_groups[0]["params"]) == 2
    group = {"params": model.parameters()}
    optimizer = build_optimizer("AdamW", {}, [group])
    assert optimizer.param_groups[0] is group and len(group["params"]) == 2
    assert len(build_optimizer("Lion", {}, model.named_parameters()).param_groups[0]["params"]) == 2


def test_muon_groups_hold_one_kind_each():
    w, b, e = params((3, 4), (4,), (9, 4))
    e.use_muon = False  # what users put on embeddings
    first = {"params": [w, b, e], "weight_decay": 0.1}
    second = {"params": params((5,)), "lr": 0.7}
    optimizer = build_optimizer("Muon", {"lr": 0.1, "muon_lr": 0.02, "adam_lr": 0.003}, [first, second])
    groups = optimizer.param_groups
    assert [g["use_muon"] for g in groups] == [True, False, False]
    assert [g["lr"] for g in groups] == [0.02, 0.003, 0.7]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.1, 0.0]
    assert groups[0] is first and groups[2] is second
    assert [[id(p) for p in g["params"]] for g in groups[:2]] == [[id(w)], [id(b), id(e)]]
    assert not build_optimizer("Muon", {"use_muon": False}, params()).param_groups[0]["use_muon"]
    with pytest.raises(ConfigError, match=r"shape \(5,\)"):
        build_optimizer("Muon", {}, [{"params": params((5,)), "use_muon": True}])


SHARDABLE = [
    ["Adam", "AdamW", "SGD", "Adagrad", "RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop"],
    ["LBFGS", "Adafactor", "SparseAdam", "Muon"],
]


@pytest.mark.parametrize("name", SHARDABLE[0])
def test_every_elementwise_class_steps_on_a_slice_as_on_the_whole(name):
    gen = torch.Generator().manual_seed(0)
    start, grads = torch.randn(513, generator=gen), torch.randn(3, 513, generator=gen)

    def run(cut):
        p = nn.Parameter(start[cut].clone())
        optimizer = getattr(torch.optim, name)([p])
        for g in grads:
            p.grad = g[cut].clone()
            optimizer.step()
        assert classify(optimizer) == "elementwise"
        return p.detach()

    whole = run(slice(None))
    for cut in (slice(0, 200), slice(200, 513)):
        assert torch.equal(run(cut), whole[cut])


@pytest.mark.parametrize("name", SHARDABLE[1])
def test_classes_that_need_whole_tensors_are_refused_by_name(name):
    optimizer = getattr(torch.optim, name)(params((2, 2)))
    assert classify(optimizer) == "whole"
    if name in UNSERVABLE:
        return
    assert require_shardable(optimizer, 0) == "whole"
    with pytest.raises(UnsupportedOptimizerError, match=rf"torch\.optim.*{name} cannot.*stage 0"):
        require_shardable(optimizer, 1, allow_untested=True)
    if name == "Muon":
        assert classify(build_optimizer("Muon", {}, params())) == "shard_aware"


UNSERVABLE = {"LBFGS": "closure", "SparseAdam": "sparse"}


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("name", UNSERVABLE)
def test_what_an_engine_cannot_serve_is_refused_at_every_stage(name, stage):
    """LBFGS ended in torch's words about a missing closure, SparseAdam in ones about dense gradients."""
    optimizer = getattr(torch.optim, name)(params((2, 2)))
    with pytest.raises(
        UnsupportedOptimizerError, match=rf"{name} cannot step in an engine.*{UNSERVABLE[name]}"
    ):
        require_shardable(optimizer, stage)


def test_unknown_classes_need_the_flag():
    class Odd(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    class Same(torch.optim.AdamW):
        pass

    class Aware(torch.optim.Optimizer):
        def __init__(self, given):
            super().__init__(given, {})

        def bind_shards(self, views): ...

    odd = Odd(params())
    with pytest.raises(UnsupportedOptimizerError, match=r"Odd.*zero_allow_untested_optimizer"):
        require_shardable(odd, 3)
    assert require_shardable(odd, 3, allow_untested=True) == "whole"
    assert classify(Same(params())) == "elementwise"
    assert classify(Aware(params())) == "shard_aware"
