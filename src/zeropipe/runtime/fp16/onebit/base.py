"""What the three compressed optimizers share: lanes, phases, who averages gradients, and the state users read.

Used alone (a plain torch optimizer on parameters with local gradients), the optimizer averages gradients
itself in dense phases. Under an engine it is bound first, and the engine keeps this protocol before each step:

    bind_communication(group)          once: the ranks that average together
    bind_shards(views)                 once, where parameters are 1-D masters: their layouts
    wants_local_gradients()            False: average the gradients over the group, as for any optimizer
                                       True:  do not; hand over each rank's own, unaveraged
    set_local_gradient(master, flat)   then, for each master: the whole buffer's gradient on this rank
    step()                             only when the gradients of all ranks are finite: an overflow must be
                                       agreed on by all ranks first, and the step skipped, so that neither the
                                       error feedback nor the phase moves

Every rank of the group calls ``step`` equally often.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from zeropipe.comm import collectives
from zeropipe.comm.group import Group, world
from zeropipe.errors import ConfigError, UnsupportedOptimizerError, UsageError, describe
from zeropipe.given import ParametersLike
from zeropipe.runtime.fp16.onebit.exchange import ERRORS, Topology
from zeropipe.runtime.fp16.onebit.lane import PHASE, Entry, Kept, Lane
from zeropipe.runtime.fp16.onebit.plan import Phase, Phases, Rules
from zeropipe.runtime.fp16.onebit.rank_state import RankState, groups_of, is_own, own_values, shared_values
from zeropipe.runtime.optimizers.shard_view import ShardView


class CompressedOptimizer(torch.optim.Optimizer, ABC):
    """Base of OnebitAdam, OnebitLamb and ZeroOneAdam, which add what a dense and what a compressed step does."""

    communicates = True  # an engine asks for this before it takes over the averaging of gradients
    rank_state_keys = ERRORS  # differ by rank; not shards of anything
    kept: ClassVar[Kept] = Kept()

    def __init__(self, params: ParametersLike, rules: Rules, given: Mapping[str, Any], *further: str) -> None:
        """``given``: the arguments of the public constructor; ``further``: those of them that a param group holds too,
        beside what all three share.

        Raises ValueError (UsageError for ``amsgrad``) for an option that cannot be.
        """
        name, (beta1, beta2) = type(self).__name__, given["betas"]
        if given["amsgrad"]:
            raise UsageError(f"{name} has no AMSGrad variant. Fix: leave out amsgrad=True")
        checks = {
            "betas": (0 <= beta1 < 1 and 0 <= beta2 < 1, "two numbers in [0, 1)", given["betas"]),
            "node_size": (given["node_size"] >= 1, "at least 1", given["node_size"]),
        }
        for key in ("lr", "eps", "weight_decay", "max_grad_norm"):
            checks[key] = (given[key] >= 0, "at least 0", given[key])
        check_ranges(name, checks)

        # What runs.
        self._phases = Phases(rules)
        self._lanes: list[Lane] = []

        # What an engine says before and between steps; without one the world averages, and ``step`` does it all.
        self._node_size: int = given["node_size"]
        self._topology: Topology | None = None
        self._engine_averages = False
        self._views: dict[nn.Parameter, ShardView] = {}
        self._local: dict[nn.Parameter, torch.Tensor] = {}

        of_a_group = ("lr", "bias_correction", "betas", "eps", "weight_decay", "max_grad_norm", *further)
        options = {key: given[key] for key in of_a_group}
        super().__init__(params, options | {"betas": tuple(given["betas"])})

        # What users and clients read.
        self.deepspeed = given["deepspeed"]
        self.eps_mode = 0 if given["eps_inside_sqrt"] else 1
        self.cuda_aware = given["cuda_aware"]
        self.comm_backend_name = given["comm_backend_name"]
        self.using_pipeline = bool(getattr(self.deepspeed, "pipeline_parallelism", False))

    @property
    def size(self) -> int:
        """How many ranks average together."""
        return self._ready().group.size

    @property
    def freeze_key(self) -> bool:
        """Whether the variance will not move any more: of 1-bit Adam, whether the coming step is compressed."""
        return self._phases.frozen

    @property
    def phases(self) -> Phases:
        """Where the optimizer stands; ``phases.next()`` tells what the coming step does."""
        return self._phases

    def check_ties(self, names: Sequence[str]) -> None:
        """Raises UnsupportedOptimizerError for weights that several pipeline stages hold.

        A tensor's scales depend on how the buffer that it lies in is cut, and each stage's is cut in its own way.
        """
        if names:
            raise UnsupportedOptimizerError(
                f"{type(self).__name__} cannot train weights that pipeline stages share: each stage would "
                "compress its copy differently, and the copies would drift apart",
                found=", ".join(names),
                fix="untie them, keep their layers on one stage, or use Adam",
            )

    def check_run(self, total_steps: object, warmup_steps: object) -> None:
        """Raises ConfigError where compression would never start, or start before the schedule's warm-up is over.

        ``total_steps``, ``warmup_steps``: of the schedule; anything but a number says nothing.
        """
        self._phases.check_run(
            *(int(n) if isinstance(n, int | float) else None for n in (total_steps, warmup_steps))
        )

    def bind_communication(self, group: Group) -> None:
        """Let an engine average gradients over ``group`` in dense phases; collective when ``node_size`` > 1.

        Raises ConfigError for options that only the engine can serve.
        """
        for index, options in enumerate(self.param_groups):
            if options.get("max_grad_norm"):
                raise ConfigError(
                    f"max_grad_norm of param group {index} cannot be used under an engine",
                    expected=0,
                    found=options["max_grad_norm"],
                    fix="use the config's gradient_clipping",
                )
        self._topology = Topology(group, self._node_size)
        self._engine_averages = True

    def bind_shards(self, views: Mapping[nn.Parameter, ShardView]) -> None:
        """Step on 1-D masters, each one shard of a layout (one shard at stage 0). More may follow."""
        self._views.update(views)

    def check_stage(self, stage: int) -> None:
        """Raises UnsupportedOptimizerError for a ZeRO stage at which this optimizer cannot work."""
        if stage >= 2:
            raise UnsupportedOptimizerError(
                f"{type(self).__name__} cannot run at ZeRO stage {stage}, which shards gradients as they come: "
                "a compressed step needs each rank's own gradient whole",
                expected="zero_optimization.stage 0 or 1",
                found=stage,
                fix="set zero_optimization.stage to 1, or use Adam at this stage",
            )

    def wants_local_gradients(self) -> bool:
        """Whether the coming step exchanges bits itself, so that gradients must not be averaged before it."""
        self._refresh()
        return self._compressed()

    def set_local_gradient(self, master: nn.Parameter, gradient: torch.Tensor) -> None:
        """This rank's own gradient for the coming step: 1-D over ``master``'s whole buffer."""
        self._local[master] = gradient

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self._lanes and self._compressed():
            # As if it had never been asked for.
            self.param_groups.pop()
            raise UsageError(
                "a param group was added after compression began: it has no variance to divide by. "
                "Fix: add it during the warm-up, or load its state with the others"
            )

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, grads: Sequence[torch.Tensor | None] | None = None
    ) -> Any:
        """One step; what ``closure`` returned, if given. ``grads``: instead of ``.grad``, one per parameter."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if grads is not None:
            params = [param for options in self.param_groups for param in options["params"]]
            if len(grads) != len(params):
                raise UsageError(
                    "step(grads=...) needs one gradient per parameter", expected=len(params), found=len(grads)
                )
            for param, grad in zip(params, grads, strict=True):
                param.grad = None if grad is None else grad.to(param.dtype)
        # [1] What an engine put into ``state`` since the last step, and parameters that are new.
        self._refresh()
        topology, lanes = self._ready(), self._lanes
        phase, after = self._phases.next()

        # [2] The gradients: averaged for a dense step, this rank's own for a compressed one.
        if phase.dense:
            # What no rank has used is skipped, as in plain PyTorch: an engine leaves such a master without gradient.
            lanes = [lane for lane in lanes if not lane.bound or lane.params[0].grad is not None]
            gradients = [lane.gradient() for lane in lanes]
            for gradient in gradients if not self._engine_averages and topology.group.size > 1 else ():
                collectives.all_reduce(gradient, topology.group, op="avg", label="gradients")
        else:
            gradients = [lane.own_gradient(self._local.get(lane.params[0])) for lane in lanes]

        limits = [lane.options["max_grad_norm"] for lane in lanes]
        if any(limits):
            # In a compressed step this is the norm of this rank's own gradients, which needs no communication.
            total = torch.stack([gradient.norm() for gradient in gradients]).norm()
            for gradient, limit in zip(gradients, limits, strict=True):
                if limit:  # 0 is none
                    gradient.mul_((limit / (total + 1e-6)).clamp(max=1.0))

        # [3] The step itself; the phase moves when all lanes are done.
        for lane, gradient in zip(lanes, gradients, strict=True):
            lane.count(phase.dense)
            if phase.dense:
                self._dense_step(lane, gradient)
            else:
                self._exchange_step(lane, gradient, phase)
        self._phases = after
        self._local.clear()
        self._publish()
        return loss

    @abstractmethod
    def _dense_step(self, lane: Lane, gradient: torch.Tensor) -> None:
        """Step with ``gradient``, the average over ranks: 1-D float32, lane.numel."""

    @abstractmethod
    def _exchange_step(self, lane: Lane, gradient: torch.Tensor, phase: Phase) -> None:
        """Step with ``gradient``, this rank's own over the whole buffer: 1-D float32, lane.layout.numel."""

    def _restored(self, lane: Lane, entries: Sequence[Entry]) -> None:
        """The lane's state was taken over from ``entries``, one per parameter, or (none) what differs by rank."""

    # -- lanes ----------------------------------------------------------------------------------------------

    def _ready(self) -> Topology:
        """Build what is missing: the topology, and lanes of param groups that have none."""
        if self._topology is None:
            self._topology = Topology(world(), self._node_size)
        known = {param for lane in self._lanes for param in lane.params}
        for index, options in enumerate(self.param_groups):
            new = [p for p in options["params"] if p not in known]
            plain = [p for p in new if p not in self._views and p.requires_grad]
            runs: list[tuple[list[nn.Parameter], ShardView | None]]
            runs = [([master], self._views[master]) for master in new if master in self._views]
            runs += [(plain, None)] if plain else []
            # A checkpoint may begin in the compressed phase: then no lane has stepped here yet.
            if runs and known and self._compressed():
                raise UsageError(
                    f"parameters of param group {index} became trainable after compression began: they have no "
                    "variance to divide by. Fix: unfreeze them during the warm-up"
                )
            self._lanes += [
                Lane(index, options, *run, self._topology, self.kept, self.eps_mode == 0) for run in runs
            ]
        return self._topology

    def _compressed(self) -> bool:
        return not self._phases.next()[0].dense

    def _refresh(self) -> None:
        """Take over what somebody else has put into ``state`` for a master: an engine that loads a checkpoint."""
        # Lanes know the dict in which they showed themselves last: any other is somebody else's.
        held = {lane.params[0]: lane.shown for lane in self._lanes if lane.bound}
        if any(self.state[p] is not held.get(p) if p in self.state else held.get(p) for p in self._views):
            self._load_entries({param: dict(entry) for param, entry in self.state.items()}, None)

    # -- checkpoints ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's form, plus ``onebit``: the phase, and which rank's error feedback this is. Masks are not saved."""
        saved = super().state_dict()
        for options in saved["param_groups"]:
            options.pop("exp_avg_mask", None)
        saved["onebit"] = {
            "phases": self._phases.to_json(),
            "rank_state": None if self._topology is None else self.rank_state(),
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of this class, or one written by DeepSpeed's optimizer of the same name.

        Error feedback is this rank's own: it is taken over when the state was saved by the same rank of a world
        of the same size, and is zero otherwise until ``load_rank_states`` redistributes it. The masks of the
        param groups stay as they are. ``freeze_step`` and the like are the new optimizer's; a state from the
        warm-up may be loaded into the compressed phase and the other way round.

        Raises CheckpointError when a tensor does not fit.
        """
        # torch's load would put the saved groups in place of these, and a mask is not saved.
        masks = [options.get("exp_avg_mask") for options in self.param_groups]
        entries: dict[torch.Tensor, dict[str, Any]] = {}
        saved = state_dict["state"]
        super().load_state_dict({**state_dict, "state": {}})
        for old, new, mask in zip(state_dict["param_groups"], self.param_groups, masks, strict=True):
            new.pop("exp_avg_mask", None)
            if mask is not None:
                new["exp_avg_mask"] = mask
            entries |= {p: saved.get(key, {}) for key, p in zip(old["params"], new["params"], strict=True)}
        info = state_dict.get("onebit") or {}
        self._load_entries(entries, info.get("phases"))
        lost = self.take_rank_states(info.get("rank_state"), tuple)
        if lost and self.size > 1:
            warnings.warn(
                "the loaded optimizer state holds no error feedback of this rank in a world of this size: it starts "
                "from zero. Load all ranks' states with load_rank_states to keep it",
                stacklevel=2,
            )

    def _load_entries(self, entries: Mapping[torch.Tensor, Entry], phases: Mapping[str, int] | None) -> None:
        """Make new lanes of the state given by parameter (or master), at ``phases`` or what the entries tell."""
        steps = max((int(entry["step"]) for entry in entries.values() if "step" in entry), default=0)
        # Under a master an engine saves where the optimizer stood with the rest; one entry is as good as another.
        told = ({k: int(v) for k, v in entry.items() if k.startswith(PHASE)} for entry in entries.values())
        phases = phases or {k.removeprefix(PHASE): v for k, v in next(filter(None, told), {}).items()}
        self._phases = self._phases.resumed(phases) if phases else self._phases.forwarded(steps)
        self._lanes.clear()
        self._ready()
        for lane in self._lanes:
            mine = [entries.get(param, {}) for param in lane.params]
            lane.restore(mine, self._phases.updates)
            self._restored(lane, mine)
        self._publish()

    def rank_state(self) -> RankState:
        """What only this rank knows: its error feedback. To be saved for each rank; plain data and live tensors."""
        self._refresh()
        topology = self._ready()
        place = {"world": topology.group.size, "rank": topology.group.rank, "node_size": self._node_size}
        return {**place, "lanes": [lane.rank_state() for lane in self._lanes]}

    def take_rank_states(self, own: RankState | None, everyone: Callable[[], Sequence[RankState]]) -> str:
        """As ``load_rank_states``, for an engine: ``own`` if it was saved by this very rank, else ``everyone``'s.

        Returns what the log should say, or "".
        """
        self._refresh()
        if not self._phases.owes:
            return ""
        if own is not None and self._is_own(own):
            self.load_rank_states([own])
            return ""
        states = everyone()
        if not states:
            return "the checkpoint holds no error feedback of this rank's tensors; it starts from zero"
        self.load_rank_states(states)
        return f"the error feedback of {len(states)} ranks was shared out among {self.size}"

    def load_rank_states(self, states: Sequence[RankState]) -> None:
        """Take over the error feedback of a run of any size, after ``load_state_dict``.

        ``states``: one per rank of the saving run (of all pipeline stages), or this rank's own alone if the ranks
        are the same. The rule is in ``rank_state``. Nothing is done in a dense beginning.
        Raises CheckpointError when they belong to other parameters, or some ranks' are missing.
        """
        self._refresh()
        own = next((state for state in states if self._is_own(state)), None)
        groups = groups_of(states) if own is None or len(states) > 1 else []
        if not self._phases.owes:
            return
        for number, lane in enumerate(self._lanes):
            values = shared_values(groups, number, lane.exchange) if own is None else own_values(own, number)
            if lane.take(values):
                self._restored(lane, ())
        self._publish()

    def _is_own(self, state: RankState) -> bool:
        return is_own(state, [lane.exchange for lane in self._lanes], self._ready())

    def _publish(self) -> None:
        for lane in self._lanes:
            lane.publish(self.state, self._phases)


def check_ranges(optimizer: str, rules: Mapping[str, tuple[bool, str, Any]]) -> None:
    """Raises ValueError for the first option that breaks its rule: key -> (whether it is kept, rule, value)."""
    for key, (kept, rule, value) in rules.items():
        if not kept:
            raise ValueError(describe(f"{optimizer}: {key} is out of range", expected=rule, found=value))
