"""Every collective against its definition: each rank can compute every rank's input, so it knows the answer.

Sums are taken in rank order, 16-bit ones in fp32 with one rounding, so the answers are exact bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.helpers.data import generator
from tests.helpers.pool import Pools
from tests.helpers.referee import assert_bitwise
from zeropipe.comm import collectives as comm
from zeropipe.comm.group import Group, new_group, new_groups, with_words, world
from zeropipe.comm.leases import LEASES
from zeropipe.comm.native import Native
from zeropipe.comm.record import Event, inject, record
from zeropipe.errors import UsageError

WORLDS = [1, 2, 3, 4]
DTYPES = ["float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool"]
SUMMED = [d for d in DTYPES if d != "bool"]
# Per rank: nothing, one, odd, the largest of one hop, one more than that, two hops with an uneven cut.
SIZES = [0, 1, 7, 4096, 4097, 10_007]


def data(rank: int, numel: int, dtype: str, key: int = 0) -> torch.Tensor:
    """The input of ``rank``: values whose sum depends on the order of additions."""
    g = generator(rank, numel, key)
    kind = getattr(torch, dtype)
    if kind.is_floating_point:
        wide = torch.randn(numel, generator=g) * 10.0 ** torch.randint(-3, 3, (numel,), generator=g)
        return wide.to(kind)
    return torch.randint(0, 2 if kind == torch.bool else 100, (numel,), generator=g).to(kind)


def expected(op: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """The definition: reduce in rank order."""
    kind = parts[0].dtype
    if op in ("max", "min"):
        return torch.stack(parts).amax(0) if op == "max" else torch.stack(parts).amin(0)
    wide = torch.float32 if kind in (torch.float16, torch.bfloat16) else kind
    total = parts[0].to(wide).clone()
    for part in parts[1:]:
        total += part.to(wide)
    return (total / len(parts) if op == "avg" else total).to(kind)


def ops(dtype: str) -> list[str]:
    return ["sum", "max", "min", *(["avg"] if getattr(torch, dtype).is_floating_point else [])]


def check_all_reduce(rank: int, size: int, dtype: str) -> None:
    for op in ops(dtype):
        for numel in SIZES:
            want = expected(op, [data(r, numel, dtype) for r in range(size)])
            tensor = data(rank, numel, dtype)
            comm.all_reduce(tensor, world(), op=op)
            assert_bitwise(tensor, want, f"all_reduce {op} {numel}")


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("dtype", SUMMED)
def test_all_reduce_is_the_sum_in_rank_order(pool: Pools, size: int, dtype: str) -> None:
    pool(size).run(check_all_reduce, dtype)


def check_reduce_scatter(rank: int, size: int, dtype: str) -> None:
    for op in ops(dtype):
        for numel in SIZES:
            inputs = [data(r, numel * size, dtype) for r in range(size)]
            want = expected(op, inputs)[rank * numel : (rank + 1) * numel]
            source, output = inputs[rank].clone(), torch.empty(numel, dtype=inputs[0].dtype)
            comm.reduce_scatter(output, source, world(), op=op)
            assert_bitwise(output, want, f"reduce_scatter {op} {numel}")
            assert_bitwise(source, inputs[rank], "the input stays")
            own = source[rank * numel : (rank + 1) * numel]
            comm.reduce_scatter(own, source, world(), op=op)
            assert_bitwise(own, want, f"in place {op} {numel}")
            others = torch.arange(numel * size) // max(numel, 1) != rank
            assert_bitwise(source[others], inputs[rank][others], "other slices stay")


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("dtype", SUMMED)
def test_reduce_scatter_gives_each_rank_its_slice_of_the_sum(pool: Pools, size: int, dtype: str) -> None:
    pool(size).run(check_reduce_scatter, dtype)


def check_moves(rank: int, size: int, dtype: str) -> None:
    """all_gather, broadcast, all_to_all, send and recv: bytes that only travel."""
    for numel in SIZES:
        shards = [data(r, numel, dtype) for r in range(size)]
        output = torch.empty(numel * size, dtype=shards[0].dtype)
        comm.all_gather(output, shards[rank], world())
        assert_bitwise(output, torch.cat(shards), f"all_gather {numel}")

        output.zero_()
        own = output[rank * numel : (rank + 1) * numel]
        own.copy_(shards[rank])
        comm.all_gather(output, own, world())
        assert_bitwise(output, torch.cat(shards), f"all_gather in place {numel}")

        for src in range(size):
            tensor = shards[rank].clone()
            comm.broadcast(tensor, src, world())
            assert_bitwise(tensor, shards[src], f"broadcast {numel} from {src}")

        sources = [data(r, numel * size, dtype, key=1) for r in range(size)]
        output.zero_()
        comm.all_to_all(output, sources[rank], world())
        mine = slice(rank * numel, (rank + 1) * numel)
        assert_bitwise(output, torch.cat([source[mine] for source in sources]), f"all_to_all {numel}")

        if size > 1:
            after, before = (rank + 1) % size, (rank - 1) % size
            got = torch.zeros_like(shards[0])
            sent = comm.send(shards[rank], after, world(), tag=3, async_op=True)
            comm.recv(got, before, world(), tag=3)
            sent.wait()
            assert_bitwise(got, shards[before], f"send/recv {numel}")


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_broadcast_exchange_and_send_move_bytes(pool: Pools, size: int, dtype: str) -> None:
    pool(size).run(check_moves, dtype)


def check_natively(rank: int, size: int, dtype: str) -> None:
    with comm.carried_by(Native()):
        check_all_reduce(rank, size, dtype)
        check_moves(rank, size, dtype)
        for numel in SIZES:
            inputs = [data(r, numel * size, dtype) for r in range(size)]
            want = list(expected("sum", inputs).tensor_split(size))
            output = torch.empty_like(want[rank])
            comm.reduce_scatter(output, inputs[rank].clone(), world())
            assert_bitwise(output, want[rank], f"reduce_scatter {numel}")
            cuts = list(enumerate(inputs[rank].clone().tensor_split(size)))
            comm.reduce_to_owners(cuts, [output.zero_()], world())
            assert_bitwise(output, want[rank], f"reduce_to_owners {numel}")
            places = [torch.zeros_like(part) for part in want]
            places[rank].copy_(output)
            comm.gather_from_owners(list(enumerate(places)), world())
            assert_bitwise(places, want, f"gather_from_owners {numel}")


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_the_backends_own_calls_give_the_same(pool: Pools, size: int, dtype: str) -> None:
    """What runs on NCCL, here by gloo's own collectives: on integers, whose sums show no order."""
    pool(size).run(check_natively, dtype)


def for_gpus_alone() -> Group:
    """The world, as one that was started with NCCL alone."""
    group = replace(with_words(world()), backends=(("cuda", "strict"),))
    assert group.carrying(torch.empty(1)).backend == "gloo"
    return group


def check_runs(rank: int, size: int, beside: bool = False) -> None:
    """A run of a flat is reduced as its cuts are, and gathers that begin together are gathers."""
    g, shard = LEASES.with_lanes(for_gpus_alone() if beside else world(), 2), 7
    for start, stop in [
        (0, shard * size),
        (0, 5),
        (3, shard * size - 2),
        (shard, 2 * shard),
        (shard + 2, shard + 2),
    ]:
        for channel, op in ((0, "sum"), (2, "avg")):
            inputs = [data(r, stop - start, "float32", key=start) for r in range(size)]
            run = comm.Run(inputs[rank].clone(), start, shard)
            want = comm.Run(expected(op, inputs), start, shard).part(rank)
            output = torch.empty_like(want)
            comm.reduce_run(run, output, g, op=op, channel=channel)
            assert_bitwise(output, want, f"{start} to {stop}")
            inside = comm.Run(inputs[rank].clone(), start, shard)
            comm.reduce_run(inside, inside.part(rank), g, op=op, channel=channel)
            assert_bitwise(inside.part(rank), want, "in place")
    numels = [3, 1, 4000]
    mine = [data(rank, numel, "bfloat16", key=numel) for numel in numels]
    outputs = [torch.empty(numel * size, dtype=torch.bfloat16) for numel in numels]
    comm.all_gather_many(outputs, mine, g, channel=1, async_op=True).wait()
    for output, numel in zip(outputs, numels, strict=True):
        assert_bitwise(output, torch.cat([data(r, numel, "bfloat16", key=numel) for r in range(size)]))


@pytest.mark.native
@pytest.mark.parametrize("size", WORLDS[1:])
def test_a_run_is_reduced_as_its_cuts_and_gathers_may_begin_together(pool: Pools, size: int) -> None:
    pool(size).run(check_runs)


@pytest.mark.parametrize("size", [2, 3])
def test_cpu_tensors_travel_beside_a_group_that_has_a_backend_for_gpus_alone(
    native_pool: Pools, size: int
) -> None:
    native_pool(size).run(check_runs, beside=True)
    native_pool(size).run(check_messages, beside=True)


def check_messages(rank: int, size: int, beside: bool = False) -> None:
    """Every member sends to every other before it receives: without tags only messages that begin together may."""
    g, others = for_gpus_alone() if beside else world(), [r for r in range(size) if r != rank]
    messages = comm.Messages(g, "test")
    sent = {r: data(rank, 6000, "float32", key=r) for r in others}
    got = {r: torch.empty(6000) for r in others}
    works = [messages.send(sent[r], r, 1) for r in others] + [messages.recv(got[r], r, 1) for r in others]
    messages.begin()
    for work in works:
        work.wait()
    for r in others:
        assert_bitwise(got[r], data(r, 6000, "float32", key=rank))
    comm.Messages(g, "none").begin()


@pytest.mark.parametrize("size", [2, 4])
def test_messages_that_begin_together_have_no_order(pool: Pools, size: int) -> None:
    pool(size).run(check_messages)


def check_same_bits(rank: int, size: int, dtype: str, numel: int) -> torch.Tensor:
    whole = data(rank, numel * size, dtype)
    reduced = whole.clone()
    comm.all_reduce(reduced, world())
    shard, gathered = torch.empty(numel, dtype=whole.dtype), torch.empty_like(whole)
    comm.reduce_scatter(shard, whole, world())
    comm.all_gather(gathered, shard, world())
    assert_bitwise(gathered, reduced, "reduce_scatter + all_gather against all_reduce")
    # Cuts of any sizes, owners in any order, some owning nothing.
    bounds = [0, 1, numel, numel * size][: size + 1]
    views = [whole[a:b] for a, b in zip(bounds, [*bounds[1:], numel * size], strict=True)][:size]
    owners = list(reversed(range(len(views))))
    cuts = list(zip(owners, views, strict=True))
    own = dict(cuts).get(rank)
    output = None if own is None else own.clone()
    comm.reduce_to_owners(cuts, [] if output is None else [output], world())
    at = sum(view.numel() for owner, view in cuts if owner > rank)
    if output is not None:
        assert_bitwise(output, reduced[at : at + output.numel()], "reduce_to_owners against all_reduce")
    # Several cuts of one owner, each into a place of its own.
    views = list(whole.tensor_split(2 * size))
    outputs = [torch.empty_like(view) for view in views[rank::size]]
    comm.reduce_to_owners([(at % size, view) for at, view in enumerate(views)], outputs, world())
    for output, expected in zip(outputs, reduced.tensor_split(2 * size)[rank::size], strict=True):
        assert_bitwise(output, expected, "reduce_to_owners of several cuts")
    # And back, in place.
    places = [torch.zeros_like(view) for view in reduced.tensor_split(size)]
    places[rank].copy_(reduced.tensor_split(size)[rank])
    comm.gather_from_owners(list(enumerate(places)), world())
    assert_bitwise(torch.cat(places), reduced, "gather_from_owners")
    return reduced


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_algorithm_gives_the_same_bits_on_every_rank(pool: Pools, size: int, dtype: str) -> None:
    for numel in (5, 3001):
        results = pool(size).run(check_same_bits, dtype, numel)
        assert_bitwise(results, [results[0]] * size)


def check_fp16_range(rank: int, size: int) -> None:
    large = torch.tensor([40_000.0, -40_000.0], dtype=torch.float16)
    comm.all_reduce(large, world(), op="avg")
    assert large.tolist() == [40_000.0, -40_000.0]
    for special in (float("inf"), float("nan")):
        tensor = torch.zeros(6000)
        if rank == size - 1:
            tensor[[0, -1]] = special
        comm.all_reduce(tensor, world())
        assert not tensor[[0, -1]].isfinite().any()
        assert tensor[1:-1].eq(0).all()


def test_an_average_of_large_fp16_values_does_not_overflow_and_nan_travels(pool: Pools) -> None:
    for size in (2, 3):
        pool(size).run(check_fp16_range)


def check_shapes(rank: int, size: int) -> None:
    scalar = torch.tensor(float(rank))
    comm.all_reduce(scalar, world())
    assert scalar.item() == sum(range(size))
    matrix = torch.full((70, 90), float(rank))
    comm.all_reduce(matrix, world(), op="max")
    assert matrix.eq(size - 1).all()
    parameter = torch.nn.Parameter(torch.full((3,), float(rank)))
    comm.broadcast(parameter.detach(), 0, world())
    assert parameter.eq(0).all()


def test_any_contiguous_shape_may_be_reduced(pool: Pools) -> None:
    pool(3).run(check_shapes)


def check_refusals(rank: int, size: int) -> None:
    g = world()
    five, four = torch.ones(5), torch.ones(4)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("elements", lambda: comm.reduce_scatter(five[:2], five, g)),
        ("elements", lambda: comm.all_gather(five, four[:2], g)),
        ("elements", lambda: comm.all_gather(four, four[:2].double(), g)),
        ("multiple of the group's 2", lambda: comm.all_to_all(five.clone(), five, g)),
        ("equal numels", lambda: comm.all_to_all(four, five, g)),
        ("one of sum, avg, max, min", lambda: comm.all_reduce(four, g, op="product")),
        ("divide", lambda: comm.all_reduce(torch.ones(3, dtype=torch.int64), g, op="avg")),
        ("contiguous", lambda: comm.all_reduce(torch.ones(4, 4).t()[:, 1:], g)),
        ("contiguous", lambda: comm.broadcast(torch.ones(4, 4).t()[:, 1:], 0, g)),
    ]
    for text, call in calls:
        with pytest.raises(UsageError, match=text):
            call()
    comm.barrier(g)  # nobody is left waiting


def test_what_cannot_be_right_is_refused_before_anything_is_sent(pool: Pools) -> None:
    pool(2).run(check_refusals)


def check_outstanding(rank: int, size: int, reverse: bool) -> None:
    """Many operations in flight, of mixed kinds and sizes, waited for in order or in reverse."""
    g = world()
    started = []
    for i, numel in enumerate([5, 9001, 1, 20_000, 4096, 3, 0, 12_345]):
        inputs = [data(r, numel * size, "float32", key=i) for r in range(size)]
        want = expected("sum", inputs)
        mine = slice(rank * numel, (rank + 1) * numel)
        reduced, shard = inputs[rank].clone(), torch.empty(numel)
        gathered = torch.empty(numel * size)
        works = [
            comm.all_reduce(reduced, g, async_op=True),
            comm.reduce_scatter(shard, inputs[rank].clone(), g, async_op=True),
            comm.all_gather(gathered, inputs[rank][mine].clone(), g, async_op=True),
        ]
        own = torch.cat([inputs[r][r * numel : (r + 1) * numel] for r in range(size)])
        started.append((works, [(reduced, want), (shard, want[mine]), (gathered, own)]))
    for works, _ in reversed(started) if reverse else started:
        for work in reversed(works) if reverse else works:
            work.wait()
            work.wait()  # twice does no harm
            assert work.done()
    for _, pairs in started:
        for got, want in pairs:
            assert_bitwise(got, want)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("reverse", [False, True])
def test_outstanding_operations_do_not_mix(pool: Pools, size: int, reverse: bool) -> None:
    pool(size).run(check_outstanding, reverse)


def check_lag(rank: int, size: int) -> None:
    """Each rank waits for its operations in the order of issue, but some ranks wait much later than others.

    A second hop that starts late must not be taken for the first hop of what was issued meanwhile.
    """
    g, lag, pending = world(), rank * 2, []
    for step in range(12):
        numel = 6000
        inputs = [data(r, numel * size, "float32", key=step) for r in range(size)]
        want = expected("sum", inputs)
        if step % 2 == 0:
            out = inputs[rank].clone()
            pending.append((comm.all_reduce(out, g, async_op=True), out, want))
        else:
            out, mine = torch.empty(numel), slice(rank * numel, (rank + 1) * numel)
            pending.append((comm.reduce_scatter(out, inputs[rank], g, async_op=True), out, want[mine]))
        while len(pending) > lag:
            work, out, want = pending.pop(0)
            work.wait()
            assert_bitwise(out, want, f"step {step}")
    for work, out, want in pending:
        work.wait()
        assert_bitwise(out, want)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_may_wait_sooner_or_later_than_others(pool: Pools, size: int) -> None:
    pool(size).run(check_lag)


def check_channels(rank: int, size: int) -> None:
    """Streams of collectives on two channels, which each rank interleaves in its own way."""
    g = world()
    inputs = [data(r, 50 * size, "float32") for r in range(size)]
    mine = slice(50 * rank, 50 * (rank + 1))
    gathers = [torch.empty(50 * size) for _ in range(4)]
    sums = [torch.empty(50) for _ in range(4)]

    def gather(i: int) -> comm.Work:
        return comm.all_gather(gathers[i], inputs[rank][mine] + i, g, async_op=True, channel=1)

    def reduce(i: int) -> comm.Work:
        cuts = list(enumerate((inputs[rank] * (i + 1)).tensor_split(size)))
        return comm.reduce_to_owners(cuts, [sums[i]], g, async_op=True, channel=2)

    works = []
    if rank == 0:
        works = [start(i) for i in range(4) for start in (gather, reduce)]
    else:
        works = [reduce(i) for i in range(4)] + [gather(i) for i in range(4)]
    for work in works:
        work.wait()
    whole = torch.cat([inputs[r][50 * r : 50 * (r + 1)] for r in range(size)])
    assert_bitwise(gathers, [whole + i for i in range(4)])
    assert_bitwise(sums, [expected("sum", [x * (i + 1) for x in inputs])[mine] for i in range(4)])


@pytest.mark.parametrize("size", [2, 3])
def test_channels_need_no_common_order(pool: Pools, size: int) -> None:
    pool(size).run(check_channels)


def check_overlap(rank: int, size: int, numel: int) -> bool:
    """Rank 0 starts early and computes meanwhile; starting must not wait for the late rank."""
    comm.barrier(world())
    late = 0.5
    if rank == 1:
        time.sleep(late)
    start = time.perf_counter()
    tensor = data(rank, numel, "float32")
    work = comm.all_reduce(tensor, world(), async_op=True)
    elapsed = time.perf_counter() - start
    if rank == 0:
        assert elapsed < late / 2, "starting an asynchronous operation waited for a peer"
    early = work.done()
    work.wait()
    assert work.done()
    assert_bitwise(tensor, expected("sum", [data(r, numel, "float32") for r in range(size)]))
    return early


@pytest.mark.parametrize("numel", [10, 100_000])
def test_asynchronous_operations_do_not_wait_at_the_start(pool: Pools, numel: int) -> None:
    pool(2).run(check_overlap, numel)


@pytest.mark.parametrize("numel", [10, 100_000])
def test_nothing_is_done_before_the_peer_has_started(pool: Pools, numel: int) -> None:
    assert pool(2).run(check_overlap, numel)[0] is False


def check_two_of_three(rank: int, size: int) -> None:
    pair = new_group([2, 0])
    assert (pair is None) == (rank == 1)
    if pair is not None:
        assert pair.ranks == (2, 0) or pair.ranks == (0, 2)
        assert pair.ranks[pair.rank] == rank
        check_in(pair)
    mine = new_groups([[0, 1], [2]])
    assert mine.size == (1 if rank == 2 else 2)
    check_in(mine)
    check_in(world())


def check_in(g: Group) -> None:
    me = g.ranks[g.rank]
    for numel in (3, 6000):
        inputs = [data(r, numel * g.size, "float32") for r in g.ranks]
        want = expected("sum", inputs)
        tensor = inputs[g.rank].clone()
        comm.all_reduce(tensor, g)
        assert_bitwise(tensor, want, f"rank {me} of {g.ranks}: all_reduce")
        shard = torch.empty(numel)
        comm.reduce_scatter(shard, inputs[g.rank], g)
        assert_bitwise(shard, want[g.rank * numel : (g.rank + 1) * numel], "reduce_scatter")
        for src in range(g.size):
            tensor = inputs[g.rank].clone()
            comm.broadcast(tensor, src, g)
            assert_bitwise(tensor, inputs[src], f"broadcast from index {src}")
        moved = torch.empty(numel * g.size)
        comm.all_to_all(moved, inputs[g.rank], g)
        part = slice(g.rank * numel, (g.rank + 1) * numel)
        assert_bitwise(moved, torch.cat([x[part] for x in inputs]), "all_to_all")
    assert comm.all_gather_object(("of", me), g) == [("of", r) for r in g.ranks]
    assert comm.broadcast_object({"from": me}, g.size - 1, g) == {"from": g.ranks[-1]}
    comm.barrier(g)


def test_a_group_of_two_of_three_ranks(pool: Pools) -> None:
    pool(3).run(check_two_of_three)


def check_grid(rank: int, size: int) -> None:
    """Rows and columns of a 2 x 2 grid, with operations in flight on both at once."""
    row, column = new_groups([[0, 1], [2, 3]]), new_groups([[0, 2], [1, 3]])
    for numel in (10, 9000):
        tensors = []
        for g in (row, column, row):
            tensor = data(rank, numel, "float32")
            tensors.append((g, tensor, comm.all_reduce(tensor, g, async_op=True)))
        for g, tensor, work in tensors:
            work.wait()
            assert_bitwise(tensor, expected("sum", [data(r, numel, "float32") for r in g.ranks]))


def test_rows_and_columns_at_once(pool: Pools) -> None:
    pool(4).run(check_grid)


def stay_out(rank: int, size: int) -> str:
    try:
        return str(new_groups([[0]]).ranks)
    except UsageError as error:
        return str(error)


def test_a_rank_in_no_group_is_told(pool: Pools) -> None:
    inside, outside = pool(2).run(stay_out)
    assert inside == "(0,)"
    assert "rank 1 is in none of the groups [[0]]" in outside


def list_events(rank: int, size: int) -> list[Event]:
    g = world()
    with record() as events:
        with record() as inner:
            comm.all_reduce(torch.ones(10), g, label="a")
        comm.reduce_scatter(torch.empty(4), torch.ones(4 * size), g, label="b", async_op=True).wait()
        comm.all_gather(torch.empty(3 * size, dtype=torch.bfloat16), torch.ones(3).bfloat16(), g, label="c")
        comm.broadcast(torch.ones(2, dtype=torch.int64), 0, g)
        comm.all_to_all(torch.empty(2 * size), torch.ones(2 * size), g)
        comm.reduce_to_owners([(0, torch.ones(5)), (size - 1, torch.ones(7))], [torch.empty(5 + 2 * rank)], g)
        comm.gather_from_owners([(0, torch.ones(5)), (size - 1, torch.ones(7))], g, label="d")
        comm.barrier(g, label="z")
        comm.all_reduce(torch.empty(0), g)
    comm.all_reduce(torch.ones(1), g)  # after the block: not recorded
    assert inner == events[:1]
    return events


def test_records_have_counts_bytes_and_labels(pool: Pools) -> None:
    for events in pool(2).run(list_events):
        assert events == [
            Event("all_reduce", 2, 40, "a", False, (0, 1)),
            Event("reduce_scatter", 2, 32, "b", True, (0, 1)),
            Event("all_gather", 2, 12, "c", False, (0, 1)),
            Event("broadcast", 2, 16, "", False, (0, 1)),
            Event("all_to_all", 2, 16, "", False, (0, 1)),
            Event("reduce_to_owners", 2, 48, "", False, (0, 1)),
            Event("gather_from_owners", 2, 48, "d", False, (0, 1)),
            Event("barrier", 2, 0, "z", False),
            Event("all_reduce", 2, 0, "", False, (0, 1)),
        ]


def break_second_call(rank: int, size: int) -> int:
    calls = []

    def fault(event: Event) -> None:
        calls.append(event)
        if len(calls) == 2:
            raise ConnectionError(f"injected at {event.label}")

    with inject(fault):
        comm.all_reduce(torch.ones(1), world(), label="first")
        with pytest.raises(ConnectionError, match="injected at second"):
            comm.all_reduce(torch.ones(1), world(), label="second")
    comm.all_reduce(torch.ones(1), world(), label="third")
    return len(calls)


def test_faults_can_be_injected_at_the_seam(pool: Pools) -> None:
    assert pool(2).run(break_second_call) == [2, 2]


def random_program(rank: int, size: int, seed: int) -> list[torch.Tensor]:
    """A random sequence of operations that all ranks issue alike, some asynchronous."""
    g = world()
    rng = generator(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=rng))

    pending, results = [], []
    for step in range(25):
        kind, numel, asynchronous = draw(4), draw(9000), bool(draw(2))
        inputs = [data(r, numel * size, "float32", key=step) for r in range(size)]
        mine = slice(rank * numel, (rank + 1) * numel)
        if kind == 0:
            out, want = inputs[rank].clone(), expected("sum", inputs)
            work = comm.all_reduce(out, g, async_op=asynchronous)
        elif kind == 1:
            out, want = torch.empty(numel), expected("avg", inputs)[mine]
            work = comm.reduce_scatter(out, inputs[rank], g, op="avg", async_op=asynchronous)
        elif kind == 2:
            out, want = torch.empty(numel * size), torch.cat([x[:numel] for x in inputs])
            work = comm.all_gather(out, inputs[rank][:numel], g, async_op=asynchronous)
        else:
            out, want = torch.empty(numel * size), torch.cat([x[mine] for x in inputs])
            work = comm.all_to_all(out, inputs[rank], g, async_op=asynchronous)
        pending.append((work, out, want, inputs))
        while len(pending) > draw(6):
            work, out, want, _ = pending.pop(draw(len(pending)))
            work.wait()
            assert_bitwise(out, want, f"step {step}")
            results.append(out.sum())
    for work, out, want, _ in pending:
        work.wait()
        assert_bitwise(out, want)
    return results


@pytest.mark.parametrize("size", [2, 3, 4])
def test_random_programs_keep_their_messages_apart(pool: Pools, size: int) -> None:
    for seed in range(3):
        pool(size).run(random_program, seed)
