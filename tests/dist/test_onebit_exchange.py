"""The compressed average: against a referee in fp64, identical on all ranks, and to the byte on the wire."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.pool import Pools
from zeropipe.comm.group import new_group, world
from zeropipe.comm.record import record
from zeropipe.errors import ConfigError, UsageError
from zeropipe.layout.flat import FlatShards, TensorSpec
from zeropipe.runtime.fp16.onebit.exchange import (
    ALIGN,
    Exchange,
    Topology,
    compressed_all_reduce,
    error_buffers,
)

# fp32 against the fp64 referee: norms of a few thousand elements and sums over ranks, each a few roundings.
ROUNDING = 2e-6


def values_of(rank: int, numel: int, step: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(1000 * step + rank)) * 10.0 ** (
        step % 3
    )


def referee(
    parts: list[torch.Tensor], worker: list[torch.Tensor], server: list[torch.Tensor]
) -> torch.Tensor:
    """The two phases of the algorithm over all ranks in one process, in fp64, straight from the formula."""
    size = len(parts)
    layout = FlatShards((TensorSpec("t", (parts[0].numel(),), "float32"),), size, ALIGN)
    result = torch.zeros(parts[0].numel(), dtype=torch.float64)
    sent: list[torch.Tensor] = []
    for rank in range(size):
        corrected = parts[rank].double() + worker[rank]
        out = torch.zeros_like(corrected)
        for shard in range(size):
            start, stop = layout.shard_range(shard)
            run = corrected[start:stop]
            if run.numel():
                out[start:stop] = run.norm() / run.numel() ** 0.5 * torch.where(run < 0, -1.0, 1.0)
        worker[rank][:] = corrected - out
        sent.append(out)
    average = torch.stack(sent).mean(0)
    for shard in range(size):
        start, stop = layout.shard_range(shard)
        run = average[start:stop] + server[shard][: average[start:stop].numel()]
        if run.numel():
            out = run.norm() / run.numel() ** 0.5 * torch.where(run < 0, -1.0, 1.0)
            server[shard][: run.numel()] = run - out
            result[start:stop] = out
    return result


def reduce_many(rank: int, size: int, numel: int, steps: int) -> list[torch.Tensor]:
    worker_error, server_error = error_buffers(torch.empty(numel))
    results = []
    for step in range(steps):
        tensor = values_of(rank, numel, step)
        returned = compressed_all_reduce(tensor, worker_error, server_error)
        assert returned is tensor
        results.append(tensor)
    return [*results, worker_error, server_error]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("numel", [0, 1, 2, 65, 1000])
def test_against_the_referee(pool: Pools, size: int, numel: int) -> None:
    steps = 3
    found = pool(size).run(reduce_many, numel, steps)
    worker = [torch.zeros(numel, dtype=torch.float64) for _ in range(size)]
    server = [torch.zeros(found[0][-1].numel(), dtype=torch.float64) for _ in range(size)]
    for step in range(steps):
        expected = referee([values_of(rank, numel, step) for rank in range(size)], worker, server)
        for rank in range(size):
            assert torch.equal(found[rank][step], found[0][step])  # the same bits everywhere
        if numel:
            assert (found[0][step] - expected).abs().max() <= ROUNDING * expected.abs().max()
    for rank in range(size):
        assert torch.allclose(found[rank][-2].double(), worker[rank], atol=1e-4)
        assert torch.allclose(found[rank][-1].double(), server[rank], atol=1e-4)


def conserve(rank: int, size: int, numel: int) -> tuple[torch.Tensor, ...]:
    """Sent + errors over many steps, in fp64 sums."""
    worker_error, server_error = error_buffers(torch.empty(numel))
    wanted, got = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
    for step in range(20):
        tensor = values_of(rank, numel, step)
        wanted += tensor
        compressed_all_reduce(tensor, worker_error, server_error)
        got += tensor
    return wanted, got, worker_error, server_error


@pytest.mark.parametrize("size", [2, 3])
def test_nothing_is_ever_lost(pool: Pools, size: int) -> None:
    """Sum of averages + mean worker error + server error = mean of the sums of the inputs."""
    numel = 200
    found = pool(size).run(conserve, numel)
    mean = torch.stack([part[0] for part in found]).mean(0)
    worker = torch.stack([part[2].double() for part in found]).mean(0)
    server = torch.cat([part[3].double() for part in found])[:numel]
    assert torch.allclose(found[0][1] + worker + server, mean, atol=20 * 100 * ROUNDING)
    assert (found[0][1] - mean).abs().max() > 0.1  # the errors do carry something


def world_of_one(rank: int, size: int) -> None:
    tensor = values_of(0, 77)
    expected = tensor.clone()
    worker_error, server_error = error_buffers(tensor)
    assert torch.equal(compressed_all_reduce(tensor, worker_error, server_error), expected)
    worker_error += 1.0
    server_error[:77] += 2.0
    assert torch.equal(compressed_all_reduce(tensor, worker_error, server_error), expected + 1.0 + 2.0)
    assert not worker_error.any() and not server_error.any()


def test_a_group_of_one_is_exact(pool: Pools) -> None:
    pool(1).run(world_of_one)
    world_of_one(0, 1)  # and so it is where torch.distributed was never started


def shapes_and_dtypes(rank: int, size: int) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        tensor = values_of(rank, 30).to(dtype).view(5, 6).t()  # not contiguous
        worker_error, server_error = error_buffers(tensor)
        before = tensor.clone()
        compressed_all_reduce(tensor, worker_error, server_error)
        assert tensor.dtype == dtype and tensor.shape == (6, 5)
        assert not torch.equal(tensor, before)
        magnitudes = tensor.abs().unique()
        assert len(magnitudes) == 1  # 30 elements lie in one shard, with one scale


def test_any_shape_and_dtype(pool: Pools) -> None:
    pool(2).run(shapes_and_dtypes)


def wrong_buffers(rank: int, size: int) -> None:
    tensor = torch.zeros(100)
    worker_error, server_error = error_buffers(tensor)
    for worker, server, name, fact in (
        (worker_error[:99], server_error, "worker_error", r"\(99,\)"),
        (worker_error, server_error[:-1], "server_error", r"\(63,\)"),
        (worker_error.half(), server_error, "worker_error", "float16"),
    ):
        with pytest.raises(UsageError, match=f"{name}.*{fact}.*error_buffers"):
            compressed_all_reduce(tensor, worker, server)


def test_wrong_buffers_are_named(pool: Pools) -> None:
    pool(2).run(wrong_buffers)


def bytes_on_the_wire(rank: int, size: int, numel: int) -> list[tuple[str, int]]:
    tensor = values_of(rank, numel)
    worker_error, server_error = error_buffers(tensor)
    with record() as events:
        compressed_all_reduce(tensor, worker_error, server_error)
    return [(event.op, event.bytes) for event in events]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_one_bit_per_element_and_one_scale_per_message(pool: Pools, size: int) -> None:
    numel = size * 64 * 100
    for events in pool(size).run(bytes_on_the_wire, numel):
        assert events == [("all_to_all", numel // 8 + 4 * size), ("all_gather", numel // 8 + 4 * size)]


SPECS = (
    TensorSpec("scalar", (), "float32"),
    TensorSpec("empty", (0, 3), "float32"),
    TensorSpec("big", (50, 7), "float32"),
    TensorSpec("small", (5,), "float32"),
)


def many_tensors(rank: int, size: int, node_size: int) -> list[torch.Tensor]:
    """Tensors of very different magnitudes in one buffer; a part of one of them is masked."""
    mask = torch.ones(356)
    mask[100:200] = 0
    exchange = Exchange(SPECS, Topology(world(), node_size), torch.device("cpu"))
    exchange.hide(mask == 0)
    worker_error, server_error = exchange.errors().values()
    assert (
        worker_error.numel()
        == exchange.ranges["worker_error"][1] - exchange.ranges["worker_error"][0]
        == exchange.layout.padded_numel // node_size
    )
    total, wanted = torch.zeros(356, dtype=torch.float64), torch.zeros(356, dtype=torch.float64)
    for step in range(4):
        values = values_of(rank, 356, step)
        values[0] *= 1e4
        values[-5:] *= 1e-4
        wanted += values
        messages = exchange.average(values)
        assert messages is not None
        average = torch.empty(356)
        exchange.decode(messages, average)
        for start, stop in ((0, 1), (3, 355), (350, 356), (10, 10)):
            part = torch.empty(stop - start)
            exchange.decode(messages, part, start)
            assert torch.equal(part, average[start:stop])
        total += average
    start, stop = exchange.ranges["worker_error"]
    held = torch.zeros(exchange.layout.padded_numel, dtype=torch.float64)
    held[start:stop] = worker_error
    first, last = exchange.layout.shard_range(exchange.topology.shard)
    served = torch.zeros_like(held)
    served[first:last] = server_error
    return [total, wanted, held[:356], served[:356], average]


@pytest.mark.parametrize(("size", "node_size"), [(2, 1), (3, 1), (4, 1), (4, 2)])
def test_many_tensors_masks_and_nodes(pool: Pools, size: int, node_size: int) -> None:
    """Each tensor keeps its own scale, masked elements stay zero everywhere, and nothing is lost."""
    found = pool(size).run(many_tensors, node_size)
    assert all(torch.equal(part[0], found[0][0]) for part in found)
    mean = torch.stack([part[1] for part in found]).mean(0)
    mean[100:200] = 0
    worker = torch.stack([part[2] for part in found]).sum(0) / (size // node_size)
    server = torch.stack([part[3] for part in found]).sum(0)
    arrived = found[0][0] + worker + server
    # Within each tensor the rounding is relative to that tensor: 8 orders of magnitude lie between them.
    for part in (slice(0, 1), slice(1, 351), slice(351, 356)):
        assert (arrived[part] - mean[part]).abs().max() <= 20 * ROUNDING * mean[part].abs().max() + 1e-9
    for tensor in (found[0][0], worker, server):
        assert not tensor[100:200].any()
    assert found[0][4][351:].abs().max() < 1.0


def one_node(rank: int, size: int) -> None:
    exchange = Exchange(SPECS, Topology(world(), size), torch.device("cpu"))
    worker_error, server_error = exchange.errors().values()
    worker_error += 0.5  # as if left by a run on more nodes
    values = values_of(rank, 356)
    mean = torch.stack([values_of(r, 356) for r in range(size)]).mean(0)
    assert exchange.average(values) is None
    assert torch.allclose(values, mean + 0.5, atol=1e-5)
    assert not worker_error.any()


def test_ranks_of_one_node_average_exactly(pool: Pools) -> None:
    pool(2).run(one_node)


def half_world(rank: int, size: int) -> list[float]:
    """Two groups of two live side by side, each with nodes of its own."""
    pairs = [new_group([0, 1]), new_group([2, 3])]
    group = next(pair for pair in pairs if pair is not None)
    tensor = torch.full((4,), float(rank))
    compressed_all_reduce(tensor, *error_buffers(tensor, group), group)
    topology = Topology(group, 2)
    assert topology.node.ranks == group.ranks and topology.across.size == 1
    with pytest.raises(ConfigError, match="divisor of 2, found 3"):
        Topology(group, 3)
    return tensor.tolist()


def test_groups_side_by_side(pool: Pools) -> None:
    assert pool(4).run(half_world) == [[0.5] * 4] * 2 + [[2.5] * 4] * 2
