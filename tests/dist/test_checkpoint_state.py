"""What training keeps beside its tensors goes on after a load as if nothing had happened, whatever it is made of."""

from __future__ import annotations

import datetime
import enum
import logging
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

import zeropipe
from tests.helpers.models import build
from zeropipe.checkpoint.convert import convert
from zeropipe.checkpoint.loader import open_source
from zeropipe.checkpoint.sources.dcp import write_dcp
from zeropipe.checkpoint.sources.universal import write_universal
from zeropipe.errors import CheckpointError

STEPS = 4


class Decay:
    """A schedule's function as an object, with state of its own."""

    def __init__(self) -> None:
        self.calls = 0
        self.history: Counter[int] = Counter()
        self.floor = np.float32(0.25)

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        self.history[epoch] += 1
        return max(float(self.floor), 1.0 / (1 + self.calls))


class Table:
    """What only code restores."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale


class DecayByTable(Decay):
    def __init__(self) -> None:
        super().__init__()
        self.table = Table()


def numpy_milestones(optimizer: Any) -> Any:
    return schedules.MultiStepLR(optimizer, list(np.array([2, 5])), gamma=np.float64(0.5))


def in_sequence(optimizer: Any) -> Any:
    first = schedules.LinearLR(optimizer, 0.5, total_iters=3)
    then = [schedules.MultiStepLR(optimizer, [1, 3]), schedules.LambdaLR(optimizer, Decay())]
    return schedules.SequentialLR(optimizer, [first, *then], milestones=[3, 6])


def chained(optimizer: Any) -> Any:
    parts = [schedules.ConstantLR(optimizer, 0.5, 3), schedules.MultiStepLR(optimizer, [2, 2, 5])]
    return schedules.ChainedScheduler([*parts, schedules.ExponentialLR(optimizer, 0.9)], optimizer)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LambdaLR of an object": lambda o: schedules.LambdaLR(o, Decay()),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, Decay()),
    "StepLR": lambda o: schedules.StepLR(o, 3),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 2, 5]),
    "MultiStepLR of numpy's numbers": numpy_milestones,
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.5, 6),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, total_iters=7),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, np.float64(0.9)),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 9, 2.0),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "CyclicLR of an object": lambda o: schedules.CyclicLR(o, 0.01, 0.1, 3, scale_fn=Decay()),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.1, total_steps=12),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=1, threshold=np.float64(0.1)),
    "SequentialLR": in_sequence,
    "ChainedScheduler": chained,
}  # fmt: skip


def engine_with(schedule: Callable[[Any], Any] | None, stage: int = 1) -> Any:
    model = build(lambda: nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    return zeropipe.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)[0]


def rates(engine: Any, steps: int) -> list[Any]:
    """Learning rate and momentum after each of the next steps."""
    found = []
    plateau = isinstance(engine.lr_scheduler, schedules.ReduceLROnPlateau)
    for _ in range(steps):
        engine.backward(engine(torch.ones(2, 4)).square().mean())
        engine.step({"metrics": 1.0} if plateau else None)
        group = engine.optimizer.param_groups[0]
        found.append((group["lr"], group["momentum"]))
    return found


def resumed(rank: int, world: int, folder: str) -> dict[str, tuple[Any, Any]]:
    found = {}
    for name, make in SCHEDULES.items():
        engine = engine_with(make)
        rates(engine, STEPS)
        engine.save_checkpoint(folder, tag=name.replace(" ", "_"))
        right = rates(engine, STEPS)
        other = engine_with(make)
        other.load_checkpoint(folder, tag=name.replace(" ", "_"))
        found[name] = (rates(other, STEPS), right)
        if "object" in name and "Cyclic" not in name:
            ours, theirs = (e.lr_scheduler.lr_lambdas[0] for e in (other, engine))
            assert vars(ours) == vars(theirs) and type(ours.history) is Counter
            assert type(ours.floor) is np.float32
        engine.destroy(), other.destroy()
    return found


def test_every_schedule_of_torch_goes_on_where_it_was(pool: Any, tmp_path: Path) -> None:
    """MultiStepLR keeps its milestones in a Counter, which took the whole schedule with it: it started anew."""
    public = {name for name in schedules.__all__ if name not in ("LRScheduler", "LambdaLR")}
    assert public <= {name.split(" ")[0] for name in SCHEDULES}
    for ours, right in pool(1).run(resumed, str(tmp_path))[0].values():
        assert ours == right


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.text.append(record.getMessage())

    def __enter__(self) -> _Lines:
        logging.getLogger("zeropipe").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("zeropipe").removeHandler(self)


def with_a_table(rank: int, world: int, folder: str) -> Any:
    engine = engine_with(lambda o: schedules.LambdaLR(o, DecayByTable()))
    engine.lr_scheduler.lr_lambdas[0].table.scale = 7.0
    rates(engine, STEPS)
    with _Lines() as told:
        engine.save_checkpoint(folder)
        engine.save_checkpoint(folder)
    with _Lines() as lost:
        other = engine_with(lambda o: schedules.LambdaLR(o, DecayByTable()))
        other.load_checkpoint(folder)
    trusting = engine_with(lambda o: schedules.LambdaLR(o, DecayByTable()))
    trusting.load_checkpoint(folder, trust=True)
    state = [e.lr_scheduler.lr_lambdas[0] for e in (other, trusting)]
    return told.text, lost.text, [(s.calls, s.table.scale) for s in state], rates(other, 2), rates(engine, 2)


def test_what_needs_code_is_named_and_the_rest_restored(pool: Any, tmp_path: Path) -> None:
    """The object is named when it is saved, once, with the way out, and again by a load that leaves it at its start."""
    told, lost, states, ours, right = pool(1).run(with_a_table, str(tmp_path))[0]
    path = "lr_scheduler.lr_lambdas[0].table"
    assert len(told) == 1 and path in told[0] and "Table" in told[0] and "trust=True" in told[0]
    assert len(lost) == 1 and path in lost[0] and "stays as it is" in lost[0]
    assert states[0][0] == states[1][0] == STEPS + 1 and (states[0][1], states[1][1]) == (1.0, 7.0)
    assert ours == right


class Colour(enum.Enum):
    RED = "red"


def client_state() -> dict[str, Any]:
    return {
        "counter": Counter("aab"), "ordered": OrderedDict(b=1, a=2), "groups": defaultdict(list, {1: [2]}),
        "window": deque([1.0, 2.0], maxlen=5), "best": np.float64(0.5), "hits": np.arange(6).reshape(2, 3),
        "path": Path("data/train"), "colour": Colour.RED, "shape": torch.Size([2]), "dtype": torch.bfloat16,
        "device": torch.device("cpu"), "seen": {1, 2}, "frozen": frozenset("ab"), "blob": b"\x00\xff", "none": b"",
        "range": range(3), "when": datetime.datetime(2026, 11, 30, 12), "complex": 1 + 2j, 3: "a number as key",
    }  # fmt: skip


def assert_same(found: dict[Any, Any], right: dict[Any, Any]) -> None:
    assert found.keys() == right.keys()
    for key, value in right.items():
        assert type(found[key]) is type(value), key
        assert np.array_equal(found[key], value) if isinstance(value, np.ndarray) else found[key] == value, (
            key
        )


def kept(rank: int, world: int, folder: str) -> Any:
    engine = engine_with(None, 2)
    engine.optimizer.param_groups[0]["tag"] = Colour.RED
    rates(engine, 1)
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    engine.save_checkpoint(folder, client_state=client_state() | {"generator": generator})
    right = torch.rand(5, generator=generator)
    other = engine_with(None, 3)
    other.optimizer.param_groups[0]["tag"] = None
    _, client = other.load_checkpoint(folder)
    assert other.optimizer.param_groups[0]["tag"] is Colour.RED
    assert torch.equal(torch.rand(5, generator=client.pop("generator")), right)
    return client


def test_client_state_comes_back_as_it_was(pool: Any, tmp_path: Path) -> None:
    for client in pool(2).run(kept, str(tmp_path)):
        assert_same(client, client_state())
    source = open_source(tmp_path)
    convert(source, tmp_path / "ds", stage=3, dp=3)
    write_universal(source, tmp_path / "uni")
    write_dcp(source, tmp_path / "dcp")
    for name in ("ds", "uni", "dcp"):
        found = open_source(tmp_path / name).train_state(0).client_state
        found.pop("generator")
        assert_same(found, client_state())


def snapshots(rank: int, world: int, folder: str) -> Any:
    engine = engine_with(None, 1)
    rates(engine, 1)
    sparse = torch.eye(3).to_sparse()
    table, array, seen, words, window = Table(1.0), np.zeros(100), {1}, bytearray(b"a"), deque([1])
    nested = {"list": [1], "counter": Counter()}
    engine.save_checkpoint(
        folder, async_save=True,
        client_state={"array": array, "seen": seen, "sparse": sparse, "words": words, "window": window,
                      "nested": nested, "table": table},
    )  # fmt: skip
    array[:] = 7
    seen.add(2)
    sparse.values().fill_(7)
    words[:] = b"b"
    window.append(2)
    nested["list"].append(5)
    nested["counter"]["x"] += 1
    table.scale = 7.0
    engine.wait_for_checkpoint()
    torch.distributed.barrier()
    client = engine.load_checkpoint(folder, trust=True)[1]
    client["array"] = float(client["array"].max())
    client["sparse"] = float(client["sparse"].to_dense().max())
    client["table"] = client["table"].scale
    return client


def test_an_asynchronous_save_copies_whatever_can_change(pool: Any, tmp_path: Path) -> None:
    """Arrays, sets and sparse tensors were saved as they were when the background came to them."""
    assert pool(2).run(snapshots, str(tmp_path))[0] == {
        "array": 0.0, "seen": {1}, "sparse": 1.0, "words": bytearray(b"a"), "window": deque([1]),
        "nested": {"list": [1], "counter": Counter()}, "table": 1.0,
    }  # fmt: skip


def unpicklable(rank: int, world: int, folder: str, asynchronous: bool) -> str:
    engine = engine_with(None, 1)
    state = {"ranks": [rank, lambda: 0]} if rank == world - 1 else {}
    try:
        engine.save_checkpoint(folder, client_state=state, async_save=asynchronous)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_client_state_that_would_be_lost_is_refused_on_every_rank(
    pool: Any, tmp_path: Path, asynchronous: bool
) -> None:
    for text in pool(2).run(unpicklable, str(tmp_path), asynchronous):
        assert "client_state.ranks[1]" in text and "function" in text
    assert list(tmp_path.iterdir()) == []
