"""zero.Init: the weights of plain construction, in shards, whatever the constructors do; nn.Module as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

from tests.dist.test_data_parallel import STEPS, gpt, nasty
from tests.helpers.data import gpt_batch, token_batch
from tests.helpers.models import NastyModel, TinyGPT
from tests.helpers.pool import RankFailure
from tests.helpers.referee import assert_bitwise
from tests.helpers.train import config, train

SEED = 1234


class Base(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.tensor(2.5))  # shape []
        nn.init.normal_(self.first.weight)  # a child's parameter, which is away by now


class Derived(Base):
    """Reads and writes what its base class and children have made."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.table = nn.Parameter(self.first.weight.detach().clone() * self.scale)
        self.register_buffer("mean", self.first.weight.mean(0))
        self.extra = Base(width)
        self.extra.first.bias.data.fill_(7.0)
        self.extra.late = nn.Parameter(torch.randn(3))  # attached to a child
        self.width = self.first.weight.shape[1] + self.first.weight.numel()


class Plain:
    """Not a module, but its constructor makes parameters of one."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed = nn.Parameter(torch.randn(5, 2))


class Mixed(Plain, nn.Module):
    pass


class Hugging(nn.Module):
    """Initializes as transformers' models do: one pass of a function over all modules, then ties."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.embed = nn.Embedding(9, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight
        self.apply(self._init_weights)
        for param in self.body[0].parameters():
            torch.nn.init.uniform_(param, 1.0, 2.0)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0.0, 0.02)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=0.5)


def encoder() -> nn.Module:
    """torch's own: deep copies of a layer, an initialization of what other modules own."""
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)


def copied() -> nn.Module:
    layer = nn.Linear(5, 3)
    return nn.Sequential(layer, nn.ReLU(), copy.deepcopy(layer))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "derived": lambda: Derived(5),
    "mixed": Mixed,
    "hugging": Hugging,
    "encoder": encoder,
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "copied": copied,
    "nasty": NastyModel,
    "gpt": TinyGPT,
}


def module_state() -> tuple[dict[str, Any], dict[type, Any], Any]:
    """Everything that zero.Init touches of torch."""
    classes, waiting = {}, [nn.Module]
    while waiting:
        cls = waiting.pop()
        classes[cls] = vars(cls).get("__init__")
        waiting += type.__subclasses__(cls)
    return dict(vars(nn.Module)), classes, (torch.arange, torch.empty, torch.get_default_dtype())


def build_both(rank: int, world: int, name: str) -> Any:
    from zeropipe import zero

    torch.manual_seed(SEED)
    plain = MODELS[name]()
    expected_draw = torch.rand(3)
    before = module_state()
    torch.manual_seed(SEED)
    with zero.Init():
        model = MODELS[name]()
    draw = torch.rand(3)
    assert module_state() == before
    for key, param in model.named_parameters():
        assert param.ds_status is zero.ZeroParamStatus.NOT_AVAILABLE, key
        assert param.shape == (0,) and param.partition_numel() == -(-param.ds_numel // world)
    assert [k for k, _ in model.named_parameters()] == [k for k, _ in plain.named_parameters()]
    assert getattr(model, "width", 0) == getattr(plain, "width", 0)
    return dict(plain.state_dict()), dict(model.state_dict()), expected_draw, draw


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_plain_construction(pool, world, name):
    for plain, sharded, expected_draw, draw in pool(world).run(build_both, name):
        assert_bitwise(sharded, plain)
        assert_bitwise(draw, expected_draw)  # the generator is where it would be


def rank_seeds(rank: int, world: int) -> Any:
    from zeropipe import zero

    torch.manual_seed(rank)
    with zero.Init():
        model = Hugging()
    return dict(model.state_dict())


def test_ranks_with_different_seeds_get_rank_0s_weights(pool):
    results = pool(2).run(rank_seeds)
    torch.manual_seed(0)
    expected = dict(Hugging().state_dict())
    for result in results:
        assert_bitwise(result, expected)


def train_both(rank: int, world: int, kind: str, how: str, settings: dict[str, Any]) -> Any:
    import zeropipe
    from zeropipe import zero

    factory, make = (gpt, gpt_batch) if kind == "gpt" else (nasty, token_batch)
    if how == "init":
        with zero.Init(config_dict_or_path=settings):
            model = factory()
    elif how == "existing":
        model = factory()
        zero.Init(module=model, config_dict_or_path=settings)
    else:  # a part under Init, the rest plain
        model = factory()
        with zero.Init(config_dict_or_path=settings):
            part = factory()
        name = "blocks" if kind == "gpt" else "wide"
        setattr(model, name, getattr(part, name))
    engine, *_ = zeropipe.initialize(model=model, config=settings)
    losses = []
    for step in range(STEPS):
        loss = engine(*make(step, rank, 0))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    weights = engine.module.state_dict()
    engine.destroy()
    return losses, {name: weights[name] for name, _ in model.named_parameters()}


@pytest.mark.native
@pytest.mark.parametrize("how", ["init", "existing", "mix"])
@pytest.mark.parametrize("kind", ["gpt", "nasty"])
def test_an_engine_trains_it_to_the_same_bits(pool, kind, how):
    factory, make = (gpt, gpt_batch) if kind == "gpt" else (nasty, token_batch)
    expected = pool(2).run(train, factory, make, config(0, 2), STEPS)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 40}
    for rank, (losses, weights) in enumerate(
        pool(2).run(train_both, kind, how, config(3, 2, zero_optimization=zero))
    ):
        assert losses == expected[rank]["losses"]
        assert_bitwise(weights, expected[0]["weights"])


class Breaks(nn.Module):
    def __init__(self, when: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.layer.weight.data.add_(1)
        if when:
            raise ValueError("no such luck")
        self.other = nn.Linear(4, 4)


def failing(rank: int, world: int) -> Any:
    from zeropipe import zero

    before = module_state()
    for _ in range(2):
        with pytest.raises(ValueError, match="no such luck"), zero.Init():
            Breaks(True)
        assert module_state() == before
    with zero.Init():  # caught inside: the context goes on
        with suppress(ValueError):
            Breaks(True)
        model = nn.Linear(4, 3)
    assert module_state() == before
    return tuple(model.state_dict()["weight"].shape)


def test_a_failing_constructor_leaves_nn_module_as_it_was(pool):
    assert pool(2).run(failing) == [(3, 4), (3, 4)]


def one_rank_fails(rank: int, world: int) -> None:
    from zeropipe import zero

    with zero.Init():
        Breaks(rank == 1)


def other_model(rank: int, world: int) -> None:
    from zeropipe import zero

    with zero.Init():
        nn.Linear(4, 4 + rank)


def other_length(rank: int, world: int) -> None:
    from zeropipe import zero

    with zero.Init():
        [nn.Linear(4, 4) for _ in range(2 + rank)]


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (one_rank_fails, ["no such luck", "DesyncError", "zero.Init raised ValueError"]),
        (other_model, ["DesyncError", "(4, 4)", "(5, 4)"]),
        (other_length, ["DesyncError", "the end of zero.Init"]),
    ],
)
def test_a_rank_that_differs_stops_all(pool, task, words):
    with pytest.raises(RankFailure) as failure:
        pool(2).run(task, timeout=20)
    for word in words:
        assert word in str(failure.value)


def nesting(rank: int, world: int) -> None:
    from zeropipe import zero

    before = module_state()
    context = zero.Init()
    for _ in range(2):  # entered again
        with context:
            a = nn.Linear(3, 3)
            with zero.Init(dtype=torch.bfloat16):
                b = nn.Linear(3, 3)
                with context:  # itself inside itself
                    c = nn.Linear(3, 3)
                with zero.Init(enabled=False):
                    d = nn.Linear(3, 3)
            assert torch.get_default_dtype() == torch.float32
            e = nn.Linear(3, 3)

            class Local(nn.Linear):  # made inside
                def __init__(self) -> None:
                    super().__init__(3, 2)
                    self.more = nn.Parameter(torch.ones(2))

            f = Local()
        for made in (a, b, c, d, e, f):
            assert all(hasattr(p, "ds_id") for p in made.parameters())
        dtypes = [m.weight.dtype for m in (a, b, d, e)]
        assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]
        after = module_state()
        assert after[0] == before[0] and after[2] == before[2]
        assert all(after[1][cls] is init for cls, init in before[1].items())
    assert not hasattr(nn.Linear(2, 2).weight, "ds_id")
    assert not hasattr(Local().more, "ds_id")
    with zero.Init(enabled=False), zero.Init(config_dict_or_path={"zero_optimization": {"stage": 2}}):
        assert not hasattr(nn.Linear(2, 2).weight, "ds_id")


def test_contexts_nest_and_are_entered_again(pool):
    pool(2).run(nesting)


def late(rank: int, world: int) -> None:
    from zeropipe import zero

    torch.manual_seed(SEED)
    with zero.Init():
        model = nn.Linear(3, 3)
        model.weight.data.mul_(2)  # outside of any constructor
        model.register_parameter("more", nn.Parameter(torch.ones(4)))
        model.again = nn.Parameter(torch.zeros(2, 2))
        nn.init.eye_(model.again)
        lazy = nn.LazyLinear(2)
        meta = nn.Linear(2, 2, device="meta")
    torch.manual_seed(SEED)
    expected = nn.Linear(3, 3)
    state = model.state_dict()
    assert torch.equal(state["weight"], expected.weight * 2)
    assert torch.equal(state["more"], torch.ones(4)) and torch.equal(state["again"], torch.eye(2))
    assert not hasattr(lazy.weight, "ds_id") and meta.weight.is_meta
    zero.Init(module=meta)
    assert meta.state_dict()["weight"].shape == (2, 2)
    assert meta.state_dict()["weight"].abs().sum() > 0


def test_parameters_attached_late_and_deferred(pool):
    pool(2).run(late)


AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"},
}


def sixteen_bits(rank: int, world: int) -> Any:
    from zeropipe import zero

    torch.manual_seed(SEED)
    with zero.Init(config_dict_or_path={**AUTO, "bf16": {"enabled": True}}):
        model = Hugging()
        kept = torch.zeros(2, dtype=torch.bfloat16), torch.ones(2), torch.arange(3)
    assert [t.dtype for t in kept] == [torch.bfloat16, torch.float32, torch.int64]
    torch.manual_seed(SEED)
    plain = Hugging()
    for param in plain.parameters():
        param.data = param.data.bfloat16()
    return dict(model.state_dict()), dict(plain.state_dict())


def test_16_bits_from_a_config_with_auto_values(pool):
    for sharded, plain in pool(2).run(sixteen_bits):
        assert_bitwise(sharded, plain)


def exchanged_constructor(rank: int, world: int) -> None:
    """As a client library does around from_pretrained: it keeps arange's own dtype."""
    from zeropipe import zero
    from zeropipe.runtime.zero import partition_parameters as names

    seen = []
    original = names.zero_wrapper_for_fp_tensor_constructor

    def exchanged(fn: Any, target_fp_dtype: Any, target_device: Any = None) -> Any:
        seen.append((fn, target_fp_dtype, target_device))
        if fn is names._orig_torch_arange:
            return lambda *a, **k: fn(*a, **{"dtype": torch.float64, **k})
        return original(fn, target_fp_dtype, target_device)

    names.zero_wrapper_for_fp_tensor_constructor = exchanged
    try:
        with zero.Init(dtype=torch.bfloat16):
            assert torch.arange(3).dtype == torch.float64
    finally:
        names.zero_wrapper_for_fp_tensor_constructor = original
    assert torch.arange(3).dtype == torch.int64
    assert (names._orig_torch_arange, torch.bfloat16, torch.device("cpu")) in seen
    assert names.get_accelerator().device_name("0") == "cpu"


def test_the_constructor_wrapper_is_looked_up_at_entry(pool):
    pool(1).run(exchanged_constructor)


WIDTH = 1000


class Row(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.weight)


class Rows(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.rows = nn.ModuleList(Row(width) for _ in range(count))
        for row in self.rows:
            row.weight.data.mul_(0.5)


def peak_while_building(rank: int, world: int) -> Any:
    """Elements gathered at one time, at most, looked at before every collective."""
    from zeropipe import zero
    from zeropipe.comm.record import inject
    from zeropipe.runtime.zero.gather import build

    build.WINDOW = 2 * WIDTH
    counts = []
    torch.manual_seed(SEED)
    with zero.Init():
        model = Rows(0, WIDTH)
        for _ in range(12):
            model.rows.append(Row(WIDTH))

        def measure(event: Any) -> None:
            counts.append(sum(p.data.numel() for p in model.parameters() if type(p).__name__ != "_Away"))

        with inject(measure):
            for row in model.rows:
                row.weight.data.mul_(0.5)
    torch.manual_seed(SEED)
    return max(counts), dict(model.state_dict()), dict(Rows(12, WIDTH).state_dict())


def test_what_is_used_again_is_put_back_as_the_constructor_goes_on(pool):
    for most, sharded, plain in pool(2).run(peak_while_building):
        assert WIDTH < most <= 3 * WIDTH  # of 12
        assert_bitwise(sharded, plain)


def whole_while_building(rank: int, world: int) -> Any:
    """Elements of parameters that are whole at one time, at most, while a model of equal modules is built."""
    from zeropipe import zero
    from zeropipe.comm.record import inject

    rows: list[Row] = []
    counts = []

    class Noted(Row):
        def __init__(self) -> None:
            rows.append(self)
            super().__init__(WIDTH)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep = nn.Sequential(*(nn.Sequential(Noted(), Noted()) for _ in range(6)))

    def measure(event: Any) -> None:
        made = [row.weight for row in rows if "weight" in row._parameters]
        whole = (p.numel() for p in made if type(p).__name__ != "_Away")
        counts.append(sum(whole))

    with inject(measure), zero.Init():
        model = Model()
    assert len(rows) == 12 and all(row.weight.numel() == 0 for row in rows)
    return max(counts), len(list(model.parameters()))


def test_one_module_is_whole_at_a_time(pool):
    assert pool(2).run(whole_while_building) == [(WIDTH, 12)] * 2


def meta_to_an_engine(rank: int, world: int) -> Any:
    import zeropipe
    from zeropipe import zero
    from zeropipe.errors import UsageError

    torch.manual_seed(0)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4))
    with pytest.raises(UsageError, match=r"meta.*zero\.Init\(module="):
        zeropipe.initialize(model=model, config=config(3, world))
    zero.Init(module=model)
    engine = zeropipe.initialize(model=model, config=config(3, world))[0]
    state = engine.module.state_dict()
    assert torch.equal(state["1.weight"], torch.ones(4)) and torch.equal(
        state["2.running_var"], torch.ones(4)
    )
    loss = engine(torch.randn(3, 4)).square().mean()
    engine.backward(loss)
    engine.step()
    engine.destroy()
    with torch.device("meta"):
        bare = Row(3)
    with pytest.raises(UsageError, match="reset_parameters"):
        zero.Init(module=bare)


def test_a_model_on_meta_is_made_module_by_module(pool):
    pool(2).run(meta_to_an_engine)


def stage_2(rank: int, world: int) -> None:
    import zeropipe
    from zeropipe import zero
    from zeropipe.errors import ConfigError

    with zero.Init():
        model = TinyGPT()
    with pytest.raises(ConfigError, match=r"zero\.Init.*stage 3"):
        zeropipe.initialize(model=model, config=config(2, world))
    for wrong in ({"dtype": torch.int8}, {"remote_device": "moon"}, {"zero_quantized_weights": True}):
        with pytest.raises(ConfigError):
            zero.Init(**wrong)


def test_what_cannot_work_is_refused(pool):
    pool(1).run(stage_2)


def remote(rank: int, world: int) -> Any:
    from zeropipe import zero

    with zero.Init(remote_device="cpu"):
        model = nn.Linear(4, 4)
    return {row.kind for row in zero.describe(model)} == {zero.ZeroParamType.REMOTE}


def test_a_remote_device_is_noted_on_the_shards(pool):
    assert pool(1).run(remote) == [True]
