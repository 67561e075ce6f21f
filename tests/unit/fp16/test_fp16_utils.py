"""Network conversion, master copies flat or not, gradients and values between them, clipping."""

from __future__ import annotations

import copy
import io
import math
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import nn

from zeropipe.errors import UsageError
from zeropipe.runtime.fp16 import fp16_utils as fp
from zeropipe.runtime.fp16.fp16_utils import (
    FP16Model,
    convert_network,
    master_params_to_model_params,
    model_grads_to_master_grads,
    prep_param_lists,
)


class Nasty(nn.Module):
    """A scalar, an empty, a frozen, a tied and an unused parameter beside ordinary ones."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.unused = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x))) * self.scale + self.empty.sum()


def test_conversion_keeps_norms_objects_and_ties() -> None:
    model = Nasty()
    model.register_buffer("ids", torch.arange(3))
    model.register_buffer("table", torch.ones(3))
    before = dict(model.named_parameters())
    assert convert_network(model, torch.float16) is model
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert model.a.weight is model.b.weight
    assert {n for n, p in after.items() if p.dtype == torch.float32} == {"norm.weight", "norm.bias"}
    assert model.ids.dtype == torch.int64 and model.table.dtype == torch.float16
    assert model(torch.randn(2, 4).half()).dtype == torch.float16


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(4), (8, 4)),
        (nn.BatchNorm1d(4, affine=False), (8, 4)),
        (nn.LayerNorm(4), (8, 4)),
        (nn.RMSNorm(4), (8, 4)),
        (nn.GroupNorm(2, 4), (8, 4)),
        (nn.InstanceNorm1d(4, affine=True), (8, 4, 5)),
        (nn.BatchNorm1d(4, track_running_stats=False), (8, 4)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_kept_norm_computes_in_fp32(norm: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    expected = copy.deepcopy(norm)(x.float()).to(dtype)
    network = convert_network(nn.Sequential(copy.deepcopy(norm)), dtype)
    assert torch.equal(network(x), expected)
    assert all(t.dtype == torch.float32 for t in [*network.parameters(), *network.buffers()] if t.dim())


def test_converting_again_and_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    x = torch.randn(3, 4)
    for dtype in (torch.float16, torch.float16, torch.bfloat16):
        convert_network(model, dtype)
        assert model(x.to(dtype)).dtype == dtype
        assert len(model[1]._forward_hooks) == len(model[1]._forward_pre_hooks) == 1
    convert_network(model, torch.float32)
    assert not model[1]._forward_hooks and not model[1]._forward_pre_hooks
    assert model(x).dtype == torch.float32


def test_a_users_own_hooks_stay() -> None:
    model = nn.Sequential(nn.LayerNorm(4))
    seen: list[torch.dtype] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    convert_network(convert_network(model, torch.float16), torch.float16)
    model(torch.randn(1, 4).half())
    assert len(seen) == 1


def test_everything_can_be_converted_with_its_gradients() -> None:
    model = Nasty()
    model(torch.randn(2, 4)).sum().backward()
    convert_network(model, torch.bfloat16, keep_fp32=())
    for p in model.parameters():
        assert p.dtype == torch.bfloat16
        assert p.grad is None or p.grad.dtype == torch.bfloat16
    assert model.a.weight.grad is not None and model.unused.weight.grad is None


def test_a_converted_network_copies_pickles_and_runs_recurrent_layers() -> None:
    network = FP16Model(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    x = torch.randn(2, 4)
    expected = network(x)
    assert torch.equal(copy.deepcopy(network)(x), expected)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    lstm = convert_network(nn.LSTM(3, 3), torch.bfloat16)
    assert lstm(torch.randn(2, 1, 3).bfloat16())[0].dtype == torch.bfloat16


def test_network_to_half_and_batch_norm() -> None:
    network = fp.network_to_half(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LayerNorm(4)))
    assert [p.dtype for p in network.parameters()] == [torch.float16] * 2 + [torch.float32] * 2 + [
        torch.float16
    ] * 2
    assert network(torch.randn(8, 4)).dtype == torch.float16

    halved = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).half()
    assert fp.BN_convert_float(halved) is halved
    assert halved[1].weight.dtype == halved[1].running_mean.dtype == torch.float32
    assert halved(torch.randn(8, 4).half()).dtype == torch.float16
    fp.BN_convert_float(halved)  # nothing left to do, and nothing undone
    assert halved(torch.randn(8, 4).half()).dtype == torch.float16


def test_casts_reach_into_containers_and_spare_token_ids() -> None:
    Pair = namedtuple("Pair", "x y")
    value = {
        "ids": torch.arange(2),
        "list": [torch.ones(1), 3],
        "pair": Pair(torch.ones(1), "text"),
        "od": OrderedDict(a=torch.ones(1)),
    }
    cast: Any = fp.cast_floating(value, torch.float16)
    assert cast["ids"].dtype == torch.int64
    assert cast["list"][0].dtype == torch.float16 and cast["list"][1] == 3
    assert isinstance(cast["pair"], Pair) and cast["pair"].x.dtype == torch.float16
    assert isinstance(cast["od"], OrderedDict) and cast["od"]["a"].dtype == torch.float16
    assert value["od"]["a"].dtype == torch.float32  # the caller's own is untouched
    assert fp.tofp16()(torch.ones(1)).dtype == torch.float16
    assert len(fp.tofp16()(torch.ones(1), torch.arange(1))) == 2


@pytest.mark.parametrize("flat", [False, True])
def test_a_step_on_masters_equals_a_step_on_an_fp32_copy(flat: bool) -> None:
    """Values, gradients and the missing gradient, for every odd parameter."""
    torch.manual_seed(0)
    model = convert_network(Nasty(), torch.bfloat16, keep_fp32=())
    reference = copy.deepcopy(model).float()
    model_params, masters = prep_param_lists(model, flat)
    assert len(model_params) == sum(p.requires_grad for p in model.parameters())
    assert len(masters) == (1 if flat else len(model_params))
    assert all(m.dtype == torch.float32 and m.requires_grad and m.is_leaf for m in masters)

    for step in range(3):
        for p in model_params:
            p.grad = None
        model(torch.randn(2, 4).bfloat16()).float().sum().backward()
        for p, r in zip(model.parameters(), reference.parameters(), strict=True):
            r.grad = None if p.grad is None else p.grad.float()
        buffer = masters[0].grad
        model_grads_to_master_grads(model_params, masters, flat)
        if step:
            assert masters[0].grad is buffer  # reused
        torch.optim.SGD(masters, lr=0.1).step()
        torch.optim.SGD(reference.parameters(), lr=0.1).step()
        master_params_to_model_params(model_params, masters, flat)
        for p, r in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(p, r.bfloat16())
            if p.grad is not None and p.requires_grad:
                assert p.grad.dtype == torch.bfloat16
    if flat:
        expected = torch.cat([r.detach().flatten() for r in reference.parameters() if r.requires_grad])
        assert torch.equal(masters[0], expected)
    else:
        assert masters[-1].shape == model_params[-1].shape


@pytest.mark.parametrize("flat", [False, True])
def test_gradients_that_come_and_go(flat: bool) -> None:
    model = nn.ModuleList([nn.Linear(2, 1, bias=False), nn.Linear(3, 1, bias=False)]).half()
    model_params, masters = prep_param_lists(model, flat)
    model_grads_to_master_grads(model_params, masters, flat)
    assert all(m.grad is None for m in masters)
    for p in model_params:
        p.grad = torch.ones_like(p)
    model_grads_to_master_grads(model_params, masters, flat)
    model_params[0].grad = None
    model_grads_to_master_grads(model_params, masters, flat)
    if flat:
        assert masters[0].grad is not None and masters[0].grad.tolist() == [0, 0, 1, 1, 1]
    else:
        assert masters[0].grad is None and masters[1].grad is not None
    model_params[1].grad = None
    model_grads_to_master_grads(model_params, masters, flat)
    assert all(m.grad is None for m in masters)


@pytest.mark.parametrize("flat", [False, True])
def test_masters_of_fp32_parameters_are_copies(flat: bool) -> None:
    model = nn.Linear(2, 2)
    model_params, masters = prep_param_lists(model, flat)
    with torch.no_grad():
        for m in masters:
            m.zero_()
    assert model.weight.abs().sum() > 0
    for p in model_params:
        p.grad = torch.ones_like(p)
    model_grads_to_master_grads(model_params, masters, flat)
    masters[0].grad.zero_()  # type: ignore[union-attr]
    assert model.weight.grad is not None and model.weight.grad.sum() == 4


@pytest.mark.parametrize("flat", [False, True])
def test_a_model_with_nothing_to_train(flat: bool) -> None:
    model_params, masters = prep_param_lists(nn.Linear(2, 2).requires_grad_(False), flat)
    assert model_params == masters == []
    model_grads_to_master_grads(model_params, masters, flat)
    master_params_to_model_params(model_params, masters, flat)


def test_a_flat_master_of_mixed_dtypes_is_refused() -> None:
    model = convert_network(Nasty(), torch.float16)
    with pytest.raises(
        UsageError, match=r"more than one dtype.*torch\.float16, torch\.float32.*flat_master=False"
    ):
        prep_param_lists(model, flat_master=True)
    assert len(prep_param_lists(model)[1]) == len(prep_param_lists(model)[0])


def test_lists_that_do_not_belong_together() -> None:
    model = nn.Linear(2, 2).half()
    model_params, flat = prep_param_lists(model, True)
    _, each = prep_param_lists(model)
    for params, masters, as_flat in (
        (model_params, flat, False),
        (model_params, each, True),
        (model_params[:1], each, False),
        (model_params[:1], flat, True),
    ):
        for p in params:
            p.grad = torch.ones_like(p)
        with pytest.raises(UsageError, match="prep_param_lists"):
            model_grads_to_master_grads(params, masters, as_flat)
        with pytest.raises(UsageError, match="prep_param_lists"):
            master_params_to_model_params(params, masters, as_flat)


def test_to_python_float() -> None:
    for value in (torch.tensor(2.5), torch.tensor([2.5]), [2.5], (2.5,), 2.5, torch.tensor(2.5).numpy()):
        assert fp.to_python_float(value) == 2.5


def with_grads(*grads: torch.Tensor | None) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.zeros_like(g) if g is not None else torch.zeros(1)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return params


def test_clipping_fp16_gradients_whose_squares_overflow() -> None:
    params = with_grads(torch.tensor([30_000.0, 40_000.0]).half(), None, torch.zeros(0).half())
    assert fp.clip_grad_norm_(params, 5.0).item() == 50_000
    assert params[0].grad is not None and params[0].grad.tolist() == [3.0, 4.0]
    assert fp.clip_grad_norm is fp.clip_grad_norm_


def test_clipping_that_has_nothing_to_do() -> None:
    params = with_grads(torch.tensor([3.0, 4.0]))
    for max_norm in (6.0, 0.0, -1.0):
        assert fp.clip_grad_norm_(iter(params), max_norm).item() == 5
        assert params[0].grad is not None and params[0].grad.tolist() == [3, 4]
    assert fp.clip_grad_norm_(params[0], 2.0, norm_type=math.inf).item() == 4
    assert params[0].grad[1].item() == pytest.approx(2, rel=1e-6)  # CLIP_EPS
    assert fp.clip_grad_norm_([], 1.0).item() == 0
    assert fp.clip_grad_norm_(with_grads(None), 1.0).item() == 0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_clipping_gradients_that_overflowed(bad: float) -> None:
    params = with_grads(torch.tensor([1.0, bad]))
    assert not math.isfinite(fp.clip_grad_norm_(params, 1.0).item())
    assert params[0].grad is not None and params[0].grad[0] == 1
    with pytest.raises(UsageError, match="finite norm"):
        fp.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
