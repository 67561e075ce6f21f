"""The three compressed optimizers: degenerate cases to the bit, events, convergence, state, hostile use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.dist import onebit_tasks as problem
from tests.helpers.pool import Pools
from zeropipe.comm.record import record
from zeropipe.errors import UnsupportedOptimizerError, UsageError
from zeropipe.runtime.fp16.onebit import OnebitAdam, OnebitLamb, ZeroOneAdam

DENSE = {
    "adam": {"freeze_step": 1000},
    "lamb": {"freeze_step": 1000},
    "zero-one": {"var_freeze_step": 1000, "var_update_scaler": 1000},
}
EARLY = {
    "adam": {"freeze_step": 4},
    "lamb": {"freeze_step": 4},
    "zero-one": {
        "var_freeze_step": 4,
        "var_update_scaler": 2,
        "local_step_scaler": 3,
        "local_step_clipper": 4,
    },
}
CONVERGE = 120  # steps


def run(rank: int, size: int, name: str, options: dict[str, Any], steps: int) -> list[torch.Tensor]:
    params = problem.make_params()
    optimizer = problem.build(name, params, **options)
    for step in range(steps):
        problem.set_gradients(params, rank, step)
        optimizer.step()
    return problem.copies(params)


def plain_recursion(name: str, size: int, steps: int) -> list[torch.Tensor]:
    """Adam or LAMB from the formula, tensor by tensor, on gradients averaged in rank order."""
    params = [p.detach().clone() for p in problem.make_params()]
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    for step in range(steps):
        every = [problem.gradients(params, rank, step) for rank in range(size)]
        for i, x in enumerate(params):
            lr, decay = (0.05, 0.01) if i < 3 else (0.02, 0.0)
            g = every[0][i].clone()
            for rank in range(1, size):
                g += every[rank][i]
            g /= size
            m[i].mul_(0.9).add_(g * (1 - 0.9))
            v[i].mul_(0.999).add_(g * g * (1 - 0.999))
            d = (m[i] / (1 - 0.9 ** (step + 1))) / ((v[i] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            if decay:
                d = d + decay * x
            if name == "lamb" and x.numel():
                ratio = float(x.double().norm() / d.double().norm())
                lr = lr * min(max(ratio, 0.01), 10.0)
            x.sub_(d * lr)
    return params


@pytest.mark.parametrize("name", ["adam", "lamb", "zero-one"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_never_leaving_the_warm_up_is_the_dense_recursion(pool: Pools, name: str, size: int) -> None:
    """Also: 0/1 Adam that updates its variance at every step is Adam."""
    found = pool(size).run(run, name, DENSE[name], 6)
    expected = plain_recursion(name, size, 6)
    for rank in range(size):
        for ours, theirs in zip(found[rank], expected, strict=True):
            if name == "lamb":  # its norms may be summed in another order
                assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)
            else:
                assert torch.equal(ours, theirs)


def against_torch(rank: int, size: int) -> None:
    params, others = problem.make_params(), problem.make_params()
    ours = OnebitAdam(params, lr=0.05, weight_decay=0.1)
    theirs = torch.optim.AdamW(others, lr=0.05, weight_decay=0.1)
    for step in range(10):
        for held in (params, others):
            problem.set_gradients(held, 0, step)
        ours.step()
        theirs.step()
    for a, b in zip(params, others, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_warm_up_is_torch_adamw() -> None:
    against_torch(0, 1)


def alone(rank: int, size: int, name: str) -> None:
    """In a world of one, compressed steps are steps with a frozen variance: nothing is rounded to a bit."""
    params = problem.make_params()
    optimizer = problem.build(name, params, **EARLY[name])
    for step in range(12):
        problem.set_gradients(params, rank, step)
        optimizer.step()
    if name == "adam":
        x, m, v = problem.make_params()[2].detach(), torch.zeros(40, 9), torch.zeros(40, 9)
        for step in range(12):
            g = problem.gradients([*params[:2], x, *params[3:]], 0, step)[2]
            m.mul_(0.9).add_(g * (1 - 0.9))
            if step < 4:
                v.mul_(0.999).add_(g * g * (1 - 0.999))
            d = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** min(step + 1, 4))).sqrt() + 1e-8)
            x = x - (d + 0.01 * x) * 0.05
        assert torch.equal(params[2].detach(), x)


@pytest.mark.parametrize("name", ["adam", "lamb", "zero-one"])
def test_a_world_of_one(name: str) -> None:
    alone(0, 1, name)


def phases_and_events(rank: int, size: int, name: str) -> list[tuple[str, list[str], bool]]:
    params = problem.make_params()
    optimizer = problem.build(name, params, **EARLY[name])
    history = []
    for step in range(16):
        phase = optimizer.phases.next()[0]
        assert optimizer.wants_local_gradients() is not phase.dense
        problem.set_gradients(params, rank, step)
        with record() as events:
            optimizer.step()
        flat = torch.cat([p.detach().reshape(-1) for p in params])
        history.append((phase.value, [event.op for event in events], flat))
    return history


@pytest.mark.parametrize("name", ["adam", "lamb", "zero-one"])
def test_each_phase_sends_what_it_says_and_ranks_agree_after_it(pool: Pools, name: str) -> None:
    first, second = pool(2).run(phases_and_events, name)
    words = [phase for phase, _, _ in first]
    if name == "zero-one":
        assert words == (
            ["variance"] * 3  # T_v: 1, 2, 3 and 5, which is past var_freeze_step
            + ["compressed"] * 4  # interval 1 for three steps after it
            + ["local", "sync", "local"]  # interval 2 for three steps
            + ["local", "local", "sync", "local", "local", "local"]  # interval 4
        )
    else:
        assert words == ["warm-up"] * 4 + ["compressed"] * 12
    per_lane = {
        "warm-up": ["all_reduce"],
        "variance": ["all_reduce"],
        "compressed": ["all_to_all", "all_gather"],
        "sync": ["all_to_all", "all_gather"],
        "local": [],
    }
    for (phase, ops, mine), (_, _, theirs) in zip(first, second, strict=True):
        assert ops == per_lane[phase] * 2  # two param groups
        assert torch.equal(mine, theirs) is (phase != "local")


def converge(rank: int, size: int, name: str, options: dict[str, Any], feedback: bool = True) -> float:
    params = problem.make_params()
    optimizer = problem.build(name, params, **options, weight_decay=0.0)
    for step in range(CONVERGE):
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * (1 - step / CONVERGE)
        problem.set_gradients(params, rank, step)
        optimizer.step()
        if not feedback:
            for state in optimizer.state.values():
                for key in ("worker_error", "server_error"):
                    if key in state:
                        state[key].zero_()
    return problem.loss(params)


@pytest.mark.parametrize("name", ["adam", "lamb", "zero-one"])
def test_compressed_training_arrives_where_dense_training_does(pool: Pools, name: str) -> None:
    """As fractions of the first loss; measured: dense 0.002, compressed 0.01-0.03, without error feedback 0.35."""
    early = {
        "adam": {"freeze_step": 20},
        "lamb": {"freeze_step": 20},
        "zero-one": {
            "var_freeze_step": 20,
            "var_update_scaler": 8,
            "local_step_scaler": 20,
            "local_step_clipper": 4,
        },
    }[name]
    start = problem.loss(problem.make_params())
    dense = pool(2).run(converge, name, DENSE[name])[0] / start
    ours = pool(2).run(converge, name, early)[0] / start
    without = pool(2).run(converge, name, early, feedback=False)[0] / start
    assert dense < 0.02
    assert ours < 0.06
    assert without > 5 * ours  # error feedback is what makes it work


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adam", EARLY["adam"]),
        ("lamb", EARLY["lamb"]),
        ("zero-one", {**EARLY["zero-one"], "local_step_clipper": 1}),
    ],
)
@pytest.mark.parametrize("size", [2, 3])
def test_stage_1_equals_stage_0_equals_the_plain_optimizer(
    pool: Pools, name: str, options: dict[str, Any], size: int
) -> None:
    plain = pool(size).run(run, name, options, 10)
    whole = pool(size).run(run_masters, name, False, options, 10)
    sharded = pool(size).run(run_masters, name, True, options, 10)
    for rank in range(size):
        for a, b, c in zip(plain[rank], whole[rank], sharded[rank], strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


def run_masters(
    rank: int, size: int, name: str, sharded: bool, options: dict[str, Any], steps: int
) -> list[Any]:
    engine = problem.Masters(name, sharded, **options)
    for step in range(steps):
        engine.step(step)
    if sharded:
        for master, view in engine.views.items():
            state = engine.optimizer.state[master]
            assert state["exp_avg"].numel() == state["exp_avg_sq"].numel() == view.layout.shard_numel
            assert "worker_error" not in state  # an engine saves state as shared by all ranks
        lanes = engine.optimizer.rank_state()["lanes"]
        for lane, view in zip(lanes, engine.views.values(), strict=True):
            assert lane["worker_error"].numel() >= view.layout.numel
    return problem.copies(engine.params)


def nodes(rank: int, size: int) -> list[torch.Tensor]:
    params = problem.make_params()
    optimizer = problem.build("adam", params, freeze_step=3, node_size=2)
    with record() as events:
        for step in range(4):
            problem.set_gradients(params, rank, step)
            optimizer.step()
    last = [(event.op, event.group_size) for event in events][-8:]
    assert last == [("reduce_scatter", 2), ("all_to_all", 2), ("all_gather", 2), ("all_gather", 2)] * 2
    for step in range(4, 40):
        problem.set_gradients(params, rank, step)
        optimizer.step()
    assert problem.loss(params) < 0.6 * problem.loss(problem.make_params())
    return problem.copies(params)


def test_full_precision_inside_a_node(pool: Pools) -> None:
    found = pool(4).run(nodes)
    for rank in range(1, 4):
        assert all(torch.equal(a, b) for a, b in zip(found[0], found[rank], strict=True))


def masked(rank: int, size: int) -> None:
    """Rows that never get a gradient, named by a mask or found out: no momentum, no error, and they stay in place."""
    for use in (True, False):
        table, other = nn.Parameter(torch.ones(30, 4)), nn.Parameter(torch.ones(7))
        mask = torch.ones(30, 4)
        mask[20:] = 0
        groups: list[dict[str, Any]] = [{"params": [table]}, {"params": [other]}]
        if use:
            groups[0]["exp_avg_mask"] = mask
        optimizer = OnebitAdam(groups, freeze_step=2, lr=0.01)
        for step in range(6):
            generator = torch.Generator().manual_seed(10 * step + rank)
            table.grad = torch.randn(30, 4, generator=generator) * mask
            other.grad = torch.randn(7, generator=generator)
            optimizer.step()
        assert torch.equal(table[20:], torch.ones(10, 4))  # they have no variance to be moved by
        state = optimizer.state[table]
        for key in ("exp_avg", "exp_avg_sq"):
            assert not state[key][20:].any()
        assert not state["worker_error"].view(30, 4)[20:].any()
        if use:
            assert "exp_avg_mask" not in optimizer.state_dict()["param_groups"][0]
            optimizer.load_state_dict(optimizer.state_dict())
            assert optimizer.param_groups[0]["exp_avg_mask"] is mask


def test_a_mask_keeps_what_has_no_gradient_in_place(pool: Pools) -> None:
    pool(2).run(masked)


def wrong_mask(rank: int, size: int) -> None:
    for mask, fact in (
        (torch.ones(4, 30), r"expected \(30, 4\), found \(4, 30\)"),
        ([None, None], "1 masks"),
    ):
        table = nn.Parameter(torch.ones(30, 4))
        optimizer = OnebitAdam([{"params": [table], "exp_avg_mask": mask}], freeze_step=1)
        table.grad = torch.ones(30, 4)
        optimizer.step()
        before = table.detach().clone()
        with pytest.raises(UsageError, match=f"exp_avg_mask of param group 0.*{fact}"):
            optimizer.step()
        assert torch.equal(table.detach(), before)


def test_a_mask_of_another_shape_is_named(pool: Pools) -> None:
    pool(2).run(wrong_mask)


def unlucky(rank: int, size: int, name: str) -> list[torch.Tensor]:
    """A frozen parameter, one whose gradient is None on one rank, one without any, and an empty param group."""
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    seldom, never, usual = (nn.Parameter(torch.ones(9)) for _ in range(3))
    groups = [{"params": [frozen, seldom, usual]}, {"params": [never]}, {"params": []}]
    optimizer = problem.CLASSES[name](groups, lr=0.01, **EARLY[name])
    for step in range(9):
        usual.grad = torch.full((9,), 1.0 + rank)
        seldom.grad = torch.ones(9) if rank == step % 2 else None
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(frozen, torch.ones(3)) and torch.equal(never, torch.ones(9))
    assert frozen not in optimizer.state
    return [seldom.detach(), usual.detach()]


@pytest.mark.parametrize("name", ["adam", "lamb", "zero-one"])
def test_frozen_unused_and_empty_parameters(pool: Pools, name: str) -> None:
    first, second = pool(2).run(unlucky, name)
    for a, b in zip(first, second, strict=True):
        assert torch.isfinite(a).all() and (a < 1).all()
        if name != "zero-one":
            assert torch.equal(a, b)


def low_precision(rank: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    params = problem.make_params(dtype)
    optimizer = problem.build("adam", params, freeze_step=20)
    for step in range(80):
        problem.set_gradients(params, rank, step)
        optimizer.step()
    assert all(p.dtype == dtype for p in params)
    assert optimizer.state[params[2]]["exp_avg"].dtype == torch.float32
    assert problem.loss(params) < 0.3 * problem.loss(problem.make_params(dtype))
    return problem.copies(params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters(pool: Pools, dtype: torch.dtype) -> None:
    first, second = pool(2).run(low_precision, dtype)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_users_read() -> None:
    params = problem.make_params()
    for name, cls in problem.CLASSES.items():
        optimizer = problem.build(name, params, **EARLY[name])
        assert isinstance(optimizer, torch.optim.Optimizer) and optimizer.communicates
        for step in range(7):
            problem.set_gradients(params, 0, step)
            optimizer.step()
        state = optimizer.state[params[2]]
        assert state["step"] == 7 and state["exp_avg"].shape == state["exp_avg_sq"].shape == (40, 9)
        assert state["worker_error"].numel() == 360
        assert optimizer.size == 1
        assert cls.__name__ in repr(optimizer)
    adam, lamb = (problem.build(name, params, freeze_step=2) for name in ("adam", "lamb"))
    assert not adam.adam_freeze_key and not lamb.lamb_freeze_key
    for step in range(2):
        problem.set_gradients(params, 0, step)
        adam.step()
        lamb.step()
    assert adam.adam_freeze_key and lamb.lamb_freeze_key and adam.freeze_step == 2
    assert len(lamb.get_lamb_coeffs()) == len(params)
    lamb.step()
    state = lamb.state[params[2]]
    for key in ("scaling_coeff", "lamb_coeff_freeze", "last_factor", "lamb_coeff"):
        assert state[key].numel() == 1 and state[key] > 0
    assert state["exp_avg_sq_fresh"].shape == (40, 9)


@pytest.mark.parametrize(
    ("cls", "options", "error", "match"),
    [
        (OnebitAdam, {"amsgrad": True}, UsageError, "AMSGrad"),
        (OnebitAdam, {"lr": -1.0}, ValueError, "lr.*at least 0.*-1.0"),
        (OnebitLamb, {"betas": (0.9, 1.0)}, ValueError, r"betas.*\[0, 1\)"),
        (ZeroOneAdam, {"max_grad_norm": -1.0}, ValueError, "max_grad_norm.*at least 0.*-1.0"),
        (ZeroOneAdam, {"node_size": 0}, ValueError, "node_size.*at least 1.*0"),
        (OnebitLamb, {"min_coeff": 3.0, "max_coeff": 2.0}, ValueError, r"max_coeff.*in order.*\(3.0, 2.0\)"),
        (OnebitLamb, {"factor_min": 0.0}, ValueError, r"factor_max.*positive.*\(0.0, 4.0\)"),
        (OnebitLamb, {"coeff_beta": 1.0}, ValueError, r"coeff_beta.*\[0, 1\).*1.0"),
        (OnebitLamb, {"factor_threshold": -0.1}, ValueError, "factor_threshold.*at least 0"),
        (OnebitAdam, {"freeze_step": 0}, ValueError, "freeze_step.*at least 1"),
        (OnebitAdam, {"freeze_step": 1.5}, ValueError, "freeze_step.*1.5"),
        (ZeroOneAdam, {"local_step_clipper": 0}, ValueError, "local_step_clipper.*at least 1"),
    ],
)
def test_bad_options_are_named(
    cls: type, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        cls([nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("freeze_step", [1, 2])
def test_what_is_unfrozen_after_compression_began_is_refused(freeze_step: int) -> None:
    """After a warm-up of one step it was taken in without a variance to divide by, and never moved."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2), requires_grad=False)]
    optimizer = OnebitAdam(params, freeze_step=freeze_step)
    for _ in range(freeze_step):
        params[0].grad = torch.ones(3)
        optimizer.step()
    params[1].requires_grad_()
    with pytest.raises(UsageError, match="became trainable after compression began"):
        optimizer.step()


def test_late_param_groups_and_sparse_gradients_are_refused() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = OnebitAdam([param], freeze_step=1)
    param.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(UsageError, match="after compression began"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 1
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedOptimizerError, match="sparse=False"):
        OnebitAdam(table.parameters()).step()


def refused(rank: int, size: int) -> None:
    with pytest.raises(UnsupportedOptimizerError, match=r"local_step_clipper.*stage 0"):
        problem.Masters("zero-one", True)
    with pytest.raises(ValueError, match=r"max_grad_norm.*gradient_clipping"):
        problem.Masters("adam", False, max_grad_norm=1.0)
    engine = problem.Masters("adam", True, freeze_step=1)
    engine.step(0)
    with pytest.raises(UsageError, match=r"own gradient of param group 0.*set_local_gradient"):
        engine.optimizer.step()


def test_what_cannot_work_under_an_engine_is_named(pool: Pools) -> None:
    pool(2).run(refused)


def closures_and_grads(rank: int, size: int) -> None:
    param, other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    first, second = OnebitAdam([param]), OnebitAdam([other])

    def closure() -> torch.Tensor:
        loss = (param * 2).sum()
        loss.backward()
        return loss

    assert first.step(closure) == 8.0
    second.step(grads=[torch.full((4,), 2.0)])
    assert torch.equal(param, other) and not torch.equal(param, torch.ones(4))
    clipped = OnebitAdam([nn.Parameter(torch.ones(4))], max_grad_norm=1.0)
    clipped.step(grads=[torch.full((4,), 100.0)])
    assert abs(float(clipped.state[clipped.param_groups[0]["params"][0]]["exp_avg"].norm()) - 0.1) < 1e-6
    with pytest.raises(UsageError, match="expected 1, found 2"):
        second.step(grads=[None, None])


def test_closures_given_gradients_and_clipping() -> None:
    closures_and_grads(0, 1)
