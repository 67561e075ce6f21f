"""Layers whose backward does what users' backwards do: custom functions with state, checkpoints, hooks, and plain ones.

Each makes a layer that takes and returns [batch, W]; what its backward calls, it appends to the list it is given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

W = 8
Act = torch.Tensor
# Each kind: `make(seen)` returns a module, and may append to `seen` whatever its backward calls.
KINDS: dict[str, Callable[[list[Any]], nn.Module]] = {}


def kind(name: str) -> Callable[[Callable[[list[Any]], nn.Module]], Callable[[list[Any]], nn.Module]]:
    def add(make: Callable[[list[Any]], nn.Module]) -> Callable[[list[Any]], nn.Module]:
        KINDS[name] = make
        return make

    return add


_definitions = itertools.count()


class Layer(nn.Module):
    """A linear layer, ``inner``, a linear layer; ``inner(layer, x)`` may use ``layer.mid`` and ``layer.p``."""

    def __init__(self, inner: Callable[[Layer, Act], Act]) -> None:
        super().__init__()
        self.first, self.mid, self.last = (nn.Linear(W, W) for _ in range(3))
        self.p = nn.Parameter(torch.randn(W))
        self.inner = inner

    def forward(self, x: Act) -> Act:
        return torch.tanh(self.last(self.inner(self, torch.tanh(self.first(x)))))


def matmul(name: str, seen: list[Any], backward: Callable[..., Any]) -> Any:
    """A custom ``x @ w.t()``; ``backward(ctx, grad, x, w)`` gives both gradients."""

    def run_forward(ctx: Any, x: Act, w: Act) -> Act:
        y = x @ w.t()
        ctx.save_for_backward(x, w, y)
        ctx.gx = ctx.gw = None
        return y

    def run_backward(ctx: Any, grad: Act) -> Any:
        seen.append(name)
        return backward(ctx, grad, *ctx.saved_tensors)

    members = {"forward": staticmethod(run_forward), "backward": staticmethod(run_backward)}
    return type(name, (torch.autograd.Function,), members)


@kind("linear")
def _(seen):
    return Layer(lambda s, x: s.mid(x))


@kind("function that scales what it keeps in place")
def _(seen):
    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.gx, ctx.gw = torch.ones(*x.shape) @ w, torch.ones_like(x).t() @ x
            return x @ w.t()

        @staticmethod
        def backward(ctx, g):
            seen.append("call")
            return ctx.gx.mul_(g.sum()), ctx.gw.mul_(g.sum())

    return Layer(lambda s, x: Fused.apply(x, s.mid.weight))


@kind("function that changes its gradient in place")
def _(seen):
    fn = matmul("ModG", seen, lambda ctx, g, x, w, y: (g.mul_(0.5) @ w, g.t() @ x))
    return Layer(lambda s, x: fn.apply(x + s.p, s.mid.weight))


@kind("gradient passed on, then changed in place")
def _(seen):
    # The addition hands one tensor to the bias, which waits, and to the function, which writes into it.
    fn = matmul("Below", seen, lambda ctx, g, x, w, y: (g.mul_(0.5) @ w, None))
    return Layer(lambda s, x: fn.apply(x, s.mid.weight.detach()) + s.p.expand(5, W))


@kind("function that counts its calls")
def _(seen):
    state = {"n": 0}

    def backward(ctx, g, x, w, y):
        state["n"] += 1
        return state["n"] * (g @ w), state["n"] * (g.t() @ x)

    fn = matmul("Counts", seen, backward)
    return Layer(lambda s, x: fn.apply(x, s.mid.weight))


@kind("function with one buffer for all its gradients")
def _(seen):
    buffer = torch.zeros(W, W)
    fn = matmul("Shared", seen, lambda ctx, g, x, w, y: (g @ w, torch.mm(g.t(), x, out=buffer)))
    return Layer(lambda s, x: fn.apply(x, s.mid.weight))


@kind("function that overwrites the output it has saved")
def _(seen):
    class Tanh(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = x.tanh()
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, g):
            seen.append("call")
            (y,) = ctx.saved_tensors
            y.data.mul_(y).neg_().add_(1).mul_(
                g
            )  # .data: no version tells the linear layer that has saved it too
            return y.clone()

    return Layer(lambda s, x: Tanh.apply(s.mid(x)))


@kind("function that frees and restores its input")
def _(seen):
    class Reversible(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = x * 2
            ctx.x, ctx.y = x, y.detach()
            return y

        @staticmethod
        def backward(ctx, g):
            seen.append("call")
            ctx.y.untyped_storage().resize_(0)
            return g * 2

    return Layer(lambda s, x: Reversible.apply(s.mid(x)))


@kind("custom function of a weight alone")
def _(seen):
    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return (w * 8).round() / 8

        @staticmethod
        def backward(ctx, g):
            seen.append("call")
            return g.mul_(0.5)

    return Layer(lambda s, x: F.linear(x, Rounded.apply(s.mid.weight), s.p))


@kind("custom op")
def _(seen):
    # A name of its own: to register a name again frees the earlier operator, and a layer that still
    # calls that one reads freed memory.
    @torch.library.custom_op(f"zeropipe_split_test::twice{next(_definitions)}", mutates_args=())
    def twice(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x @ w

    def backward(ctx, g):
        seen.append("call")
        return g @ ctx.w.t(), ctx.x.t() @ g

    def setup(ctx, inputs, output):
        ctx.x, ctx.w = inputs

    twice.register_autograd(backward, setup_context=setup)
    return Layer(lambda s, x: twice(x, s.mid.weight))


def counted(s: Layer, seen: list[Any]) -> Callable[[Act], Act]:
    def run(x: Act) -> Act:
        seen.append("forward")
        return s.norm(s.mid(x))

    return run


@kind("reentrant checkpoint")
def _(seen):
    layer = Layer(lambda s, x: checkpoint(counted(s, seen), x, use_reentrant=True))
    layer.norm = nn.BatchNorm1d(W)
    return layer


@kind("checkpoint")
def _(seen):
    layer = Layer(lambda s, x: checkpoint(counted(s, seen), x, use_reentrant=False))
    layer.norm = nn.BatchNorm1d(W)
    return layer


@kind("saved on the host")
def _(seen):
    def inner(s, x):
        with save_on_cpu():
            return s.mid(x)

    return Layer(inner)


@kind("hook on an activation")
def _(seen):
    def inner(s, x):
        y = s.mid(x)
        y.register_hook(lambda g: (seen.append("hook"), g * 3)[1])
        y.retain_grad()
        return y

    return Layer(inner)


@kind("hook on a node's input")
def _(seen):
    def inner(s, x):
        y = s.mid(x)
        y.grad_fn.register_prehook(lambda gs: (seen.append("hook"), (gs[0] * 3,))[1])
        return y

    return Layer(inner)


@kind("hook behind a node")
def _(seen):
    def inner(s, x):
        y = s.mid(x)
        y.grad_fn.register_hook(lambda out, _: (seen.append("hook"), tuple(g * 3 for g in out))[1])
        return y

    return Layer(inner)


@kind("full backward hook on a module")
def _(seen):
    layer = Layer(lambda s, x: s.mid(x))
    layer.mid.register_full_backward_hook(lambda m, i, o: (seen.append("hook"), (i[0] * 3,))[1])
    layer.mid.register_full_backward_pre_hook(lambda m, o: (seen.append("pre"), (o[0] * 3,))[1])
    return layer


@kind("old backward hook on a module")
def _(seen):
    layer = Layer(lambda s, x: s.mid(x))
    layer.mid.register_backward_hook(
        lambda m, i, o: (seen.append("hook"), tuple(None if g is None else g * 3 for g in i))[1]
    )
    return layer


@kind("parameter hook, used twice")
def _(seen):
    layer = Layer(lambda s, x: s.mid(torch.tanh(s.mid(x) * s.p)) * s.p)
    for param in (layer.p, layer.mid.weight):
        param.register_hook(lambda g: (seen.append("hook"), g * 3)[1])
        param.register_post_accumulate_grad_hook(lambda _: seen.append("added"))
    return layer


@kind("derived weight with a hook")
def _(seen):
    def inner(s, x):
        w = s.mid.weight * 2
        w.register_hook(lambda g: (seen.append("hook"), g * 3)[1])
        return torch.tanh(x @ w) @ w

    return Layer(inner)


@kind("in place on a view")
def _(seen):
    def inner(s, x):
        y = s.mid(x)
        y[:, 0] = y[:, 1].clone() * s.p[0]
        y[:, 2:4].add_(s.p[2:4])
        y += s.p
        return y

    return Layer(inner)


@kind("compiled")
def _(seen):
    return Layer(torch.compile(lambda s, x: torch.tanh(s.mid(x)) * s.p, backend="aot_eager"))


@kind("recurrent")
def _(seen):
    layer = Layer(lambda s, x: s.gru(s.lstm(x.unsqueeze(1))[0])[0].squeeze(1))
    layer.lstm, layer.gru = nn.LSTM(W, W, 2), nn.GRU(W, W, bidirectional=False)
    return layer


@kind("convolution")
def _(seen):
    def inner(s, x):
        y = s.norm(s.conv(x.unsqueeze(1)))
        return s.group(s.up(y)).mean(1)

    layer = Layer(inner)
    layer.conv, layer.norm = nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4)
    layer.up, layer.group = nn.ConvTranspose1d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
    return layer


@kind("attention")
def _(seen):
    layer = Layer(lambda s, x: s.block(x.unsqueeze(0)).squeeze(0))
    layer.block = nn.TransformerEncoderLayer(W, 2, 16, dropout=0.0, batch_first=True)
    return layer


@kind("elementwise")
def _(seen):
    def inner(s, x):
        y = s.bilinear(x, s.prelu(x)) + torch.where(x > 0, x, s.p)
        return torch.einsum("bi,ij,j->bj", y, s.mid.weight, s.p).cumsum(-1)

    layer = Layer(inner)
    layer.prelu, layer.bilinear = nn.PReLU(), nn.Bilinear(W, W, W)
    return layer


@kind("parametrized")
def _(seen):
    layer = Layer(lambda s, x: s.mid(x))
    parametrizations.weight_norm(layer.mid)
    parametrizations.orthogonal(layer.last)
    return layer


@kind("autocast")
def _(seen):
    def inner(s, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return s.mid(x).float() + x

    return Layer(inner)


@kind("broadcast")
def _(seen):
    # What a node gives for a parameter may be larger than the parameter, and of another dtype.
    layer = Layer(lambda s, x: x * s.one + s.p * s.short + torch.complex(x, x).mul(s.one).real)
    layer.one, layer.short = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(1, 1).half())
    return layer
