"""Ranks that share a sequence compute what one process computes on the whole of it: attention, gradients, training."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.dist.test_zero3 import NOTHING_PERSISTS
from tests.helpers.data import generator
from tests.helpers.referee import weights_of
from tests.helpers.train import config
from zeropipe.comm.record import record
from zeropipe.errors import ConfigError, UsageError
from zeropipe.runtime.sequence_parallel import place
from zeropipe.runtime.sequence_parallel.attention import DistributedAttention
from zeropipe.runtime.sequence_parallel.data import UlyssesSPDataLoaderAdapter, shard_batch
from zeropipe.runtime.sequence_parallel.exchange import Heads, exchange
from zeropipe.runtime.sequence_parallel.place import (
    get_data_parallel_rank,
    get_sequence_parallel_rank,
    initialize_sequence_parallel,
)
from zeropipe.runtime.sequence_parallel.tiled import TiledFusedLogitsLoss, TiledMLP

WIDTH, TOKENS, WORDS, STEPS = 32, 24, 40, 3


class _Net(nn.Module):
    """A layer of causal attention with grouped queries, and a head; ``group``: the ranks of a sequence."""

    def __init__(self, heads: int, keys: int, group: Any = None, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.keys, self.checkpointed = heads, keys, checkpointed
        self.dim = 8
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.q = nn.Linear(WIDTH, heads * self.dim)
        self.kv = nn.Linear(WIDTH, 2 * keys * self.dim, bias=False)
        self.out, self.head = nn.Linear(heads * self.dim, WIDTH), nn.Linear(WIDTH, WORDS)
        self.attention = _attend if group is None else DistributedAttention(_attend, group, 2, 1)

    def forward(self, ids: torch.Tensor, places: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places(places)
        if self.checkpointed:
            from torch.utils.checkpoint import checkpoint

            x = x + checkpoint(self._layer, x, use_reentrant=False)
        else:
            x = x + self._layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), reduction="sum")

    def _layer(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (self.heads, self.dim))
        k, v = self.kv(x).unflatten(-1, (2 * self.keys, self.dim)).chunk(2, 2)
        return self.out(self.attention(q, k, v).flatten(2))


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _batch(step: int, sample: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(WORDS, (2, TOKENS), generator=generator(step, sample))
    labels = ids.clone()
    labels[:, : 4 + sample] = -100  # prompts of different lengths: ranks count different numbers of tokens
    return {"input_ids": ids, "labels": labels}


def _share(batch: dict[str, torch.Tensor], rank: int, ranks: int) -> list[torch.Tensor]:
    part = shard_batch(batch, rank, ranks)
    return [part["input_ids"], part["position_ids"], part["shift_labels"]]


def _train(
    rank: int,
    world: int,
    ranks: int,
    stage: int,
    heads: tuple[int, int],
    precision: str = "fp32",
    checkpointed: bool = False,
    samples: int = 0,
) -> dict[str, Any]:
    """Three steps of ``samples`` samples (default: one a sequence): losses, norms, the whole weights."""
    import zeropipe

    places = world // ranks
    gas = (samples or places) // places
    mpu = initialize_sequence_parallel(ranks)
    assert (get_data_parallel_rank(), get_sequence_parallel_rank()) == divmod(rank, ranks)
    settings = config(
        stage,
        places,
        gas=gas,
        gradient_clipping=0.5,
        sequence_parallel_size=ranks,
        **({"bf16": {"enabled": True}} if precision == "bf16" else {}),
    )
    model = _Net(*heads, mpu.sequence_group if ranks > 1 else None, checkpointed)
    del settings["optimizer"]
    engine = zeropipe.initialize(model=model, optimizer=_sgd(model), config=settings, mpu=mpu)[0]
    assert (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()) == (gas * places, 1)
    losses, norms = [], []
    for step in range(STEPS):
        for micro in range(gas):
            batch = _batch(step, rank // ranks + places * micro)
            # Of the mean over the sequence's tokens this rank has a part, and the average over ranks adds them up.
            loss = engine(*_share(batch, rank % ranks, ranks)) / _counted(batch)
            engine.backward(loss * ranks)
            engine.step()
            losses.append(float(loss.detach()))
        norms.append(engine.get_global_grad_norm())
    weights = {}
    for name, param in engine.module.named_parameters():
        with zeropipe.zero.GatheredParameters([param]):
            weights[name] = param.detach().clone().float()
    engine.destroy()
    initialize_sequence_parallel(1)
    return {"losses": losses, "norms": norms, "weights": weights}


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    # Not Adam, which makes steps of one size of gradients that are nothing but rounding.
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def _counted(batch: dict[str, torch.Tensor]) -> int:
    return int((batch["labels"][:, 1:] >= 0).sum())


@cache
def _plainly(heads: tuple[int, int], samples: int) -> dict[str, Any]:
    """The same training in plain PyTorch, on whole sequences."""
    model = _Net(*heads)
    optimizer = _sgd(model)
    losses, norms = [], []
    for step in range(STEPS):
        for sample in range(samples):
            batch = _batch(step, sample)
            loss = model(*_share(batch, 0, 1)) / _counted(batch)
            (loss / samples).backward()
            losses.append(loss.item())
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "norms": norms, "weights": dict(model.named_parameters())}


def _losses(found: list[dict[str, Any]], ranks: int) -> list[float]:
    """The loss of each sample in each step: the sum of its ranks' parts."""
    parts = torch.tensor([one["losses"] for one in found])  # [rank, step]
    return parts.view(-1, ranks, STEPS).sum(1).T.flatten().tolist()


@pytest.mark.native
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("world", "ranks", "heads"), [(2, 2, (4, 4)), (4, 4, (8, 2)), (4, 2, (6, 3)), (3, 3, (4, 2))]
)
def test_training_is_that_of_one_process(pool, world: int, ranks: int, heads: tuple[int, int], stage: int):
    """Grouped queries with fewer key heads than ranks, and heads that the ranks do not divide, among them."""
    found = pool(world).run(_train, ranks, stage, heads)
    plain = _plainly(heads, world // ranks)
    assert _losses(found, ranks) == pytest.approx(plain["losses"], rel=2e-6)
    assert found[0]["norms"] == pytest.approx(plain["norms"], rel=1e-5)
    for name, value in plain["weights"].items():
        for one in found:
            torch.testing.assert_close(one["weights"][name], value, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16(pool, stage: int):
    found = pool(2).run(_train, 2, stage, (4, 2), "bf16")
    plain = pool(1).run(_train, 1, 0, (4, 2), "bf16")[0]
    assert _losses(found, 2) == pytest.approx(plain["losses"], rel=1e-2)
    assert found[0]["norms"] == pytest.approx(plain["norms"], rel=2e-2)


@pytest.mark.native
@pytest.mark.parametrize("stage", [0, 3])
def test_with_activation_checkpoints(pool, stage: int):
    found = pool(2).run(_train, 2, stage, (4, 4), checkpointed=True)
    assert found[0]["weights"].keys() == (plain := _plainly((4, 4), 1))["weights"].keys()
    assert _losses(found, 2) == pytest.approx(plain["losses"], rel=2e-6)
    assert found[0]["norms"] == pytest.approx(plain["norms"], rel=1e-5)


def _there_and_back(rank: int, world: int) -> None:
    group = initialize_sequence_parallel(world).sequence_group
    whole = torch.randn(2, 3 * world, 4 * world, 5, generator=generator(7), dtype=torch.float64)
    x = whole.chunk(world, 1)[rank].clone().requires_grad_()
    found = exchange(x, group, split=2, join=1)
    assert found.equal(whole.chunk(world, 2)[rank])
    assert exchange(found, group, split=1, join=2).equal(x)
    # The gradient of a gradient goes through exchanges too: d/dx of |dy/dx|**2 for y = the sum of x**3.
    (grad,) = torch.autograd.grad(found.pow(3).sum(), x, create_graph=True)
    grad.square().sum().backward()
    torch.testing.assert_close(x.grad, 36 * x.detach() ** 3)
    for dtype in (torch.bfloat16, torch.float16, torch.int64):
        own = torch.arange(4 * world).to(dtype).view(2, -1) + rank
        assert exchange(own, group, split=1, join=0).equal(
            torch.cat([own[:, 2 * rank : 2 * rank + 2] - rank + r for r in range(world)])
        )
    with pytest.raises(UsageError, match=rf"dim 1 .* a multiple of {world}"):
        exchange(whole[:, 1:], group, split=1, join=2)
    initialize_sequence_parallel(1)


@pytest.mark.native
@pytest.mark.parametrize("world", [2, 3, 4])
def test_an_exchange_and_its_gradient(pool, world: int):
    pool(world).run(_there_and_back)


def _turns(rank: int, world: int, lengths: list[list[int]], broken: int | None = None) -> list[Any]:
    group = initialize_sequence_parallel(world).sequence_group

    def loader() -> Any:
        for at, length in enumerate(lengths[rank]):
            ids = 100 * rank + 10 * at + torch.arange(length).view(1, -1) % 10
            yield {"input_ids": ids, "labels": ids.clone(), "source": f"{rank}.{at}"}
        if rank == broken:
            raise OSError("disk gone")

    adapter = UlyssesSPDataLoaderAdapter(
        loader() if broken is not None else _Again(loader), rank, group, world, "cpu"
    )
    try:
        first = list(adapter)
    finally:
        initialize_sequence_parallel(1)
    assert [b["source"] for b in adapter] == [b["source"] for b in first]  # a second epoch
    assert next(adapter)["source"] == first[0]["source"]
    return first


class _Again:
    def __init__(self, make: Any) -> None:
        self._make = make

    def __iter__(self) -> Any:
        return self._make()


def test_ranks_take_turns_in_each_others_batches(pool):
    """Of other lengths, of a length that the ranks do not divide, and where one loader ends before the other."""
    found = pool(2).run(_turns, [[8, 7], [6]])
    assert [[b["source"] for b in one] for one in found] == [["0.0", "1.0", "0.1"]] * 2
    for key, joined in (
        ("input_ids", [10, 11, 12, 13, 14, 15, 16, 0]),
        ("shift_labels", [11, 12, 13, 14, 15, 16, -100, -100]),
        ("position_ids", list(range(8))),
    ):
        parts = [one[2][key] for one in found]
        assert torch.cat(parts, 1).tolist() == [joined], key


def test_an_error_of_one_loader_is_told_to_all(pool):
    errors = pool(2).run_faulty(_turns, [[4], [4]], broken=1)
    assert ["disk gone" in outcome.error for outcome in errors] == [True, True]


def _wrong(rank: int, world: int) -> None:
    import zeropipe

    def build(**given: Any) -> None:
        zeropipe.initialize(model=nn.Linear(4, 4), config=config(0, 1, **given.pop("settings", {})), **given)

    with pytest.raises(UsageError, match=r"a divisor of the 4 ranks.*3.*use one of 1, 2, 4"):
        initialize_sequence_parallel(3)
    mpu = initialize_sequence_parallel(2)
    with pytest.raises(ConfigError, match=r"one number.*4 by config key 'sequence_parallel_size', 2 by"):
        build(mpu=mpu, settings={"sequence_parallel_size": 4})
    with pytest.raises(ConfigError, match=r"'data_parallel_size'.*2, so that with 2 ranks to a sequence"):
        build(settings={"sequence_parallel_size": 2, "data_parallel_size": 4})
    with pytest.raises(ConfigError, match=r"train_batch_size.*1 x 1 x 2 = 2"):
        build(mpu=mpu, settings={"train_micro_batch_size_per_gpu": 1, "train_batch_size": 4})

    class Foreign:  # as of a client that divides sequences and has no word for the whole
        def get_data_parallel_group(self) -> Any:
            return mpu.get_data_parallel_group()

        def get_sequence_parallel_world_size(self) -> int:
            return 2

    with pytest.raises(UsageError, match="get_sequence_data_parallel_group"):
        build(mpu=Foreign())
    initialize_sequence_parallel(1)


def test_what_contradicts_itself_is_named_on_every_rank(pool):
    pool(4).run(_wrong)


def _said(rank: int, world: int, how: str) -> tuple[int, list[int], list[float]]:
    import zeropipe
    from zeropipe.utils import groups

    settings = config(1, 2)
    given: dict[str, Any] = {}
    if how == "config":
        settings |= {"sequence_parallel_size": 2, "data_parallel_size": 2}
    elif how == "functions":  # as a client gives the module parallel_state_sp
        initialize_sequence_parallel(2)
        given["mpu"] = place
    elif how == "pair":
        given["mesh_param"] = (2, 2)
    else:
        from torch.distributed.device_mesh import init_device_mesh

        given["mesh_param"] = init_device_mesh(
            "cpu", (2, 2), mesh_dim_names=("data_parallel", "sequence_parallel")
        )
    data = [(torch.full((4,), float(i)), torch.zeros(4)) for i in range(4)]
    engine, _, loader, _ = zeropipe.initialize(
        model=nn.Linear(4, 4), config=settings, training_data=data, **given
    )
    sizes = [
        engine.train_batch_size(),
        groups._get_sequence_parallel_world_size(),
        groups._get_sequence_parallel_rank(),
        groups._get_data_parallel_world_size(),
        groups._get_data_parallel_rank(),
    ]
    import torch.distributed as dist

    assert dist.get_process_group_ranks(groups._get_sequence_parallel_group()) == [
        rank // 2 * 2,
        rank // 2 * 2 + 1,
    ]
    seen = [float(x[0, 0]) for x, _ in loader]
    engine.destroy()
    initialize_sequence_parallel(1)
    assert groups._get_sequence_parallel_world_size() == 1
    return rank, sizes, seen


@pytest.mark.parametrize("how", ["config", "functions", "pair", "mesh"])
def test_who_may_say_how_sequences_are_divided(pool, how: str):
    """The ranks of a sequence get the same samples, and they count once in a batch."""
    found = pool(4).run(_said, how)
    assert found[0][2] == found[1][2] != found[2][2] == found[3][2]
    for rank, sizes, _ in found:
        assert sizes == [2, 2, rank % 2, 2, rank // 2]


@pytest.mark.parametrize(
    ("queries", "keys", "ranks"), [(8, 2, 4), (6, 6, 4), (4, 1, 3), (12, 4, 8), (5, 5, 5)]
)
def test_each_query_head_meets_its_key_head(queries: int, keys: int, ranks: int):
    plan = Heads(queries, keys, ranks)
    q = torch.arange(1, queries + 1).view(1, -1, 1)
    k = torch.arange(keys).view(1, -1, 1)
    whole_q, whole_k = plan.spread(q, 1), plan.spread(k, 1)
    assert whole_q.shape[1] % ranks == whole_k.shape[1] % ranks == 0
    assert whole_q.shape[1] - queries < ranks
    met = [
        (int(one), int(other))
        for qs, ks in zip(whole_q.chunk(ranks, 1), whole_k.chunk(ranks, 1), strict=True)
        for one, other in zip(qs.flatten(), ks.repeat_interleave(plan.groups, 1).flatten(), strict=True)
        if one > 0
    ]
    assert met == [(head + 1, head // (queries // keys)) for head in range(queries)]
    per_head = torch.arange(queries) + 1
    own = torch.cat([plan.own(per_head, rank) for rank in range(ranks)])
    assert own[:queries].equal(per_head) and not own[queries:].any()


class _Tiled(nn.Module):
    def __init__(self, tiles: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tiles = tiles
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(WIDTH, 64), "down": nn.Linear(64, WIDTH)}) for _ in range(2)
        )
        self.layers[0]["up"].requires_grad_(False)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    @staticmethod
    def mlp(layer: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        return layer["down"](F.gelu(layer["up"](x)))

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(x).float(), y, reduction="sum")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, flat = self.words(ids), ids.flatten()
        for layer in self.layers:
            x = x + (TiledMLP.apply(self.mlp, layer, x, self.tiles) if self.tiles else self.mlp(layer, x))
        if not self.tiles:
            return self.loss(x.flatten(0, 1), flat) / flat.numel()
        total = TiledFusedLogitsLoss.apply(_Tiled.loss, self, x, ids, None, self.tiles, None, "sum")
        return total / flat.numel()


def _tiles(rank: int, world: int, stage: int, tiles: int, precision: str) -> dict[str, Any]:
    import zeropipe

    settings = config(stage, world, gas=2, zero_optimization={"stage": stage, **NOTHING_PERSISTS})
    if precision != "fp32":
        settings[precision] = {"enabled": True} | ({"initial_scale_power": 8} if precision == "fp16" else {})
    del settings["optimizer"]
    model = _Tiled(tiles)
    engine = zeropipe.initialize(model=model, optimizer=_sgd(model), config=settings)[0]
    losses = []
    for step in range(2 * STEPS):
        with record() as events:
            loss = engine(torch.randint(WORDS, (2, 11), generator=generator(step, rank)))
            engine.backward(loss)
            engine.step()
        losses.append(float(loss.detach()))
    sent = sorted(event.bytes for event in events)  # of the last step
    found = {"losses": losses, "norm": engine.get_global_grad_norm(), "sent": sent}
    found["weights"] = weights_of(engine.module)
    engine.destroy()
    return found


@pytest.mark.native
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "fp16"), (3, "fp32"), (3, "bf16")])
def test_tiles_train_as_the_whole(pool, stage: int, precision: str):
    """Under accumulation and a loss scale, with a frozen layer, and gathered tile by tile at stage 3."""
    found = pool(2).run(_tiles, stage, 3, precision)
    whole = pool(2).run(_tiles, stage, 0, precision)
    bound = 2e-6 if precision == "fp32" else 1e-2
    for one, other in zip(found, whole, strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=bound)
        assert one["sent"] == other["sent"]  # no parameter is gathered once more for a tile
        assert one["norm"] == pytest.approx(other["norm"], rel=5 * bound)
        for name, value in other["weights"].items():
            torch.testing.assert_close(one["weights"][name], value, atol=bound, rtol=bound)


def _kept(rank: int, world: int) -> int:
    """Elements that autograd keeps of a forward, but for parameters."""
    mpu = initialize_sequence_parallel(world)
    model = _Net(4, 4, mpu.sequence_group if world > 1 else None)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    memories: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            memories[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(*_share(_batch(0, 0), rank, world))
    initialize_sequence_parallel(1)
    return sum(memories.values()) + 0 * int(loss)


def test_a_rank_keeps_its_part(pool):
    """Of n: 1/n, and once more an output of attention, since what was exchanged is kept beside it."""
    whole = pool(1).run(_kept)[0]
    for world in (2, 4):
        attended = 2 * TOKENS * WIDTH * 4  # bytes
        assert max(pool(world).run(_kept)) <= (whole + attended) / world * 1.02


def _layouts(rank: int, world: int, heads: int, keys: int) -> None:
    group = initialize_sequence_parallel(world).get_sequence_parallel_group()
    q, k, v = (torch.randn(2, 3 * world, n, 4, generator=generator(n)) for n in (heads, keys, keys))
    whole = _attend(q, k, v)
    mine = [x.chunk(world, 1)[rank] for x in (q, k, v)]
    expected = whole.chunk(world, 1)[rank]

    def first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Tokens first, and heads joined with their dim, as in Megatron."""
        return _attend(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1).flatten(2) * scale

    by_batch = DistributedAttention(_attend, group)(*mine, 0)
    torch.testing.assert_close(by_batch, expected)
    turned = [x.transpose(0, 1) for x in mine]
    for found in (
        DistributedAttention(first, group)(*turned, 1, scale=2.0),
        DistributedAttention(first, group, scatter_idx=2, gather_idx=0)(*turned, None, 2.0),
    ):
        torch.testing.assert_close(found, expected.transpose(0, 1).flatten(2) * 2.0)
    with pytest.raises(UsageError, match="rotary_pos_emb is not applied"):
        DistributedAttention(_attend, group)(*mine, 0, rotary_pos_emb=(q, q))
    with pytest.raises(UsageError, match=r"heads of queries and \d+ of keys"):
        DistributedAttention(_attend, group)(mine[0], *(x.repeat(1, 1, 5, 1) for x in mine[1:]), 0)
    initialize_sequence_parallel(1)


@pytest.mark.native
@pytest.mark.parametrize(("world", "heads", "keys"), [(2, 4, 2), (3, 4, 4), (4, 6, 2)])
def test_an_attention_of_any_layout(pool, world: int, heads: int, keys: int):
    pool(world).run(_layouts, heads, keys)


def _saved(rank: int, world: int, folder: str, stage: int) -> dict[str, torch.Tensor]:
    import zeropipe

    mpu = initialize_sequence_parallel(world)
    settings = config(stage, 1, sequence_parallel_size=world)
    with zeropipe.zero.Init(mpu=mpu, config_dict_or_path=settings):
        model = _Net(4, 2, mpu.sequence_group)
    engine = zeropipe.initialize(model=model, config=settings, mpu=mpu)[0]
    batch = _batch(0, 0)
    engine.backward(engine(*_share(batch, rank, world)) / _counted(batch) * world)
    engine.step()
    engine.save_checkpoint(folder)
    weights = weights_of(engine.module)
    engine.destroy()
    initialize_sequence_parallel(1)
    return weights


def _loaded(rank: int, world: int, folder: str) -> dict[str, torch.Tensor]:
    import zeropipe

    engine = zeropipe.initialize(model=_Net(4, 2), config=config(0, world))[0]
    assert engine.load_checkpoint(folder)[0]
    weights = weights_of(engine.module)
    engine.destroy()
    return weights


@pytest.mark.parametrize("stage", [1, 3])
def test_a_model_built_in_shards_is_saved_and_loaded_by_one_process(pool, tmp_path, stage: int):
    saved = pool(3).run(_saved, str(tmp_path), stage)[0]
    loaded = pool(1).run(_loaded, str(tmp_path))[0]
    assert saved.keys() == loaded.keys()
    for name, value in saved.items():
        assert value.equal(loaded[name]), name
