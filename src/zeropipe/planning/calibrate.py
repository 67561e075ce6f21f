"""``zeropipe plan calibrate``: what this machine does, from a few steps of a small transformer on real ranks.

All ranks measure at once, since they share the memory and its bandwidth, and of each thing the least time counts, since
nothing else of a busy machine can be known. In turn::

    kernels   the engine trains a transformer, each kernel is timed: rates, and what takes longer than they say
    launch    the engine trains one so small that its kernels take no time
    links     collectives of a few bytes and of many, and a message
    overlap   a product and a collective, alone and together
    base      what the process has when all of that is gone
"""

from __future__ import annotations

import gc
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zeropipe.comm.collectives import all_gather, all_reduce, barrier, recv, reduce_scatter, send
from zeropipe.comm.group import Group, world
from zeropipe.entry import initialize
from zeropipe.errors import UsageError
from zeropipe.planning.crew import crew
from zeropipe.planning.devices import KNOWN, Device
from zeropipe.planning.work import Kernel, kernel
from zeropipe.tensor.memory import FreedMemory

_DTYPES = ("float32", "bfloat16")
_STEPS = 8  # of each engine that is timed, after two to warm up
_LARGE, _SMALL = 2**22, 2**8  # elements of what travels
_OFTEN = 10
_PATIENCE = 900.0  # seconds: it takes some, and many where others keep the machine busy
_WORTH = 20e-6  # seconds: a kernel that should take less says nothing of its operator


@dataclass(frozen=True)
class _Shape:
    width: int
    tokens: int
    vocabulary: int
    layers: int = 2
    batch: int = 4


_USUAL, _TINY = _Shape(512, 128, 4096), _Shape(32, 8, 64, batch=1)


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.first(x)).view(batch, tokens, 3, 8, width // 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        x = x + F.dropout(self.out(mixed.transpose(1, 2).reshape(batch, tokens, width)), 0.1)
        inner = self.up(self.second(x))
        return x + self.down(F.gelu(inner) + F.silu(inner) * F.relu(inner))


class _Transformer(nn.Module):
    """``model(tokens)`` is a loss; of the usual operators each is somewhere in it."""

    def __init__(self, shape: _Shape) -> None:
        super().__init__()
        self.token = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(_Layer(shape.width) for _ in range(shape.layers))
        self.norm, self.head = nn.LayerNorm(shape.width), nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), tokens.flatten())


class _Stopwatch(TorchDispatchMode):
    """How long each kernel takes: ``rounds`` of them, each in the order in which they ran."""

    def __init__(self, wait: Callable[[], None]) -> None:
        super().__init__()
        self._wait = wait
        self.rounds: list[list[tuple[Kernel, float]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        began = time.perf_counter()
        result = func(*args, **kwargs)
        self._wait()
        took = time.perf_counter() - began
        views = any(
            one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns
        )
        if func.namespace == "aten" and not views:
            found = kernel("", func, args, kwargs, result)
            if found is not None:
                self.rounds[-1].append((found, took))
        return result

    def least(self) -> list[tuple[Kernel, float]]:
        """The kernels of a step, each with the least that it took in any round."""
        usual = median(map(len, self.rounds))
        alike = [one for one in self.rounds if len(one) == usual] or self.rounds[-1:]
        return [(column[0][0], min(took for _, took in column)) for column in zip(*alike, strict=True)]


@dataclass
class _Found:
    """What one rank has measured: seconds and bytes."""

    kernels: list[tuple[Kernel, float]] = field(default_factory=list)
    launch: float = 0.0
    small: float = 0.0  # of an all_gather
    links: dict[str, float] = field(default_factory=dict)  # of what travels, by operation
    overlap: float = 0.0
    base: int = 0
    memory: int = 0


class _Rank:
    """One rank at work."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._gpu = torch.cuda.is_available()
        self._device = torch.device("cuda", torch.cuda.current_device()) if self._gpu else torch.device("cpu")
        self._group = world()
        self.found = _Found()

    def measure(self) -> _Found:
        for dtype in _DTYPES:
            self.found.kernels += self._train(_USUAL, dtype, watched=True)[0]
        kernels, seconds = self._train(_TINY, "float32", watched=True)[0], self._train(_TINY, "float32")[1]
        if self._group.size > 1:
            self._links()
            self.found.overlap = self._overlap()
        # Of the seconds of a tiny step the gradients' way to the other ranks is a part.
        sent = self.found.links.get("small all_reduce", 0.0)
        self.found.launch = max(1e-6, (seconds - 2 * sent) / len(kernels))
        self.found.base, self.found.memory = self._sizes()
        return self.found

    def _wait(self) -> None:
        if self._gpu:
            torch.cuda.synchronize()

    def _least(self, do: Callable[[], object], often: int = 1) -> float:
        """Seconds of ``do``, which all ranks begin together; what is short is tried more ``often``."""
        times = []
        for _ in range(self._steps * often):
            barrier(self._group)
            began = time.perf_counter()
            do()
            self._wait()
            times.append(time.perf_counter() - began)
        return min(times)

    def _train(
        self, shape: _Shape, dtype: str, watched: bool = False
    ) -> tuple[list[tuple[Kernel, float]], float]:
        """The kernels of a step, where they are ``watched``, and the least seconds of a whole one."""
        engine, *_ = initialize(
            model=_Transformer(shape),
            config={
                "train_micro_batch_size_per_gpu": shape.batch,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
                "bf16": {"enabled": dtype == "bfloat16"},
            },
        )
        tokens = torch.randint(shape.vocabulary, (shape.batch, shape.tokens), device=self._device)

        def step() -> None:
            engine.backward(engine(tokens))
            engine.step()

        for _ in range(2):
            step()
        watch, seconds = _Stopwatch(self._wait), 0.0
        if watched:
            for _ in range(self._steps):
                watch.rounds.append([])
                with watch:
                    step()
        else:
            seconds = self._least(step, _OFTEN)
        engine.destroy()
        return watch.least() if watched else [], seconds

    def _links(self) -> None:
        group, links = self._group, self.found.links
        for numel, size in ((_SMALL, "small "), (_LARGE, "")):
            whole = torch.ones(numel, device=self._device)
            part = whole.tensor_split(group.size)[group.rank].clone()
            whole = whole[: part.numel() * group.size]
            calls: dict[str, Callable[[], object]] = {
                "all_gather": lambda w=whole, p=part: all_gather(w, p, group).wait(),  # type: ignore[misc]
                "reduce_scatter": lambda w=whole, p=part: reduce_scatter(p, w, group).wait(),  # type: ignore[misc]
                "all_reduce": lambda w=whole: all_reduce(w, group).wait(),  # type: ignore[misc]
                "send": partial(_pass, whole, group),
            }
            for op, call in calls.items():
                call()
                links[size + op] = self._least(call, _OFTEN if size else 1)
        self.found.small = links["small all_gather"]

    def _overlap(self) -> float:
        """How much of the shorter of a product and a collective hides behind the other."""
        group = self._group
        whole = torch.ones(_LARGE // group.size * group.size, device=self._device)
        part = whole.tensor_split(group.size)[group.rank].clone()
        a, b = (torch.ones(768, 768, device=self._device) for _ in range(2))

        def compute() -> None:
            for _ in range(4):
                torch.mm(a, b)

        def both() -> None:
            under_way = all_gather(whole, part, group, async_op=True)
            compute()
            under_way.wait()

        alone, sending, together = map(
            self._least, (compute, lambda: all_gather(whole, part, group).wait(), both)
        )
        return min(1.0, max(0.0, (alone + sending - together) / min(alone, sending)))

    def _sizes(self) -> tuple[int, int]:
        """Bytes that this process has by itself, and that a rank may have."""
        gc.collect()
        if self._gpu:
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(self._device)
            return total - free, total
        FreedMemory().give_back()
        return _resident(), _machine() // self._group.size


def _pass(tensor: Tensor, group: Group) -> None:
    """One message from the first rank to the second."""
    if group.rank == 0:
        send(tensor, 1, group).wait()
    elif group.rank == 1:
        recv(tensor, 0, group).wait()


def _resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return KNOWN["cpu"].base


def _machine() -> int:
    """Bytes of memory of this machine, or of the container."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    words = limit.read_text().strip() if limit.is_file() else "max"
    return min(whole, int(words)) if words.isdigit() else whole


def calibrate(ranks: int | None = None, steps: int = _STEPS, name: str = "this machine") -> Device:
    """Measure this machine with ``ranks`` processes at once (default: one for each GPU, 2 without); some seconds.

    In a process that has computed nothing yet, as it is forked. Raises UsageError where a rank fails.
    """
    gpus = torch.cuda.device_count()
    count = (gpus or 2) if ranks is None else ranks
    if gpus and count > gpus:
        raise UsageError("calibrate: a rank for each GPU", expected=f"at most {gpus}", found=count)
    return device_from(
        crew(partial(_one, steps=steps), count, _PATIENCE), "cuda" if gpus else "cpu", count, name
    )


def _mean(kernels: Sequence[tuple[Kernel, float]]) -> dict[Kernel, float]:
    """Seconds of each kernel, on average over where it stands in a step."""
    times: defaultdict[Kernel, list[float]] = defaultdict(list)
    for one, took in kernels:
        times[one].append(took)
    return {one: mean(took) for one, took in times.items()}


def _one(rank: int, steps: int) -> _Found:
    torch.set_num_threads(torch.get_num_threads())
    return _Rank(steps).measure()


def device_from(found: Sequence[_Found], kind: str, ranks: int, name: str) -> Device:
    """The device that explains what the ranks have ``found``; what they could not measure is as in the known one."""
    base = KNOWN["cpu" if kind == "cpu" else "h200"]
    # The slower rank counts, as in a step.
    each = [_mean(one.kernels) for one in found]
    kernels = [(one, max(times[one] for times in each if one in times)) for one in each[0]]
    flops, bandwidth = dict(base.flops), base.bandwidth
    for dtype in _DTYPES:
        rates = [k.flops / took for k, took in kernels if k.op in ("mm", "addmm") and k.dtype == dtype]
        flops[dtype] = median(rates)
    flops["float16"] = flops["float16"] if "float16" in flops and kind == "cuda" else flops["bfloat16"]
    bandwidth = median(k.nbytes / took for k, took in kernels if k.op in ("add", "mul") and k.nbytes > 2**20)
    made = replace(
        base,
        name=name,
        kind=kind,
        memory=min(f.memory for f in found),
        flops=flops,
        bandwidth=bandwidth,
        launch=max(f.launch for f in found),
        base=max(f.base for f in found),
        slower={},
    )
    spent: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for one, took in kernels:
        roof = made.roof(one)
        if roof > _WORTH:
            total = spent[f"{one.op} {one.dtype}"]
            total[0] += took
            total[1] += roof
    slower = {key: took / roof for key, (took, roof) in spent.items()}
    if ranks > 1:
        worst = {op: max(f.links[op] for f in found) for op in found[0].links}
        nbytes = _LARGE * 4
        share = (ranks - 1) / ranks
        latency = worst["small all_gather"]
        inside = nbytes * share / max(1e-9, worst["all_gather"] - latency)
        made = replace(made, latency=latency, inside=inside, overlap=min(f.overlap for f in found))
        everyone = tuple(range(ranks))
        for op in ("reduce_scatter", "all_reduce", "send"):
            slower[op] = worst[op] / made.sends(op, nbytes, everyone)
        slower["reduce_to_owners"] = slower["reduce_scatter"]
    return replace(made, slower={key: round(value, 3) for key, value in slower.items()})
