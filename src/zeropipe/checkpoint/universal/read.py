"""Opens the universal format, ours or DeepSpeed's, as a source: every parameter is a flat of one shard."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint import constants as k
from zeropipe.checkpoint.files import load_torch
from zeropipe.checkpoint.legacy import KNOWN_KEYS
from zeropipe.checkpoint.manifest import FlatEntry, TensorEntry
from zeropipe.checkpoint.numbers import STEP
from zeropipe.checkpoint.plain import decode
from zeropipe.checkpoint.state import CLIENT, FP32, PARAM, ModuleRest, TrainState, rest_back, training_back
from zeropipe.checkpoint.universal.patterns import rules_in
from zeropipe.checkpoint.writer import OURS
from zeropipe.errors import CheckpointError
from zeropipe.layout.flat import FlatShards, TensorSpec
from zeropipe.paths import inside

OUR_FILE = "zeropipe_state.pt"


class UniversalSource:
    """A folder with ``zero/NAME/*.pt``. Raises CheckpointError when it has no model file beside them."""

    stage = 0

    def __init__(self, folder: Path, tag: str, *, trust: bool = False) -> None:
        self.folder = folder
        self.tag = tag
        self._trust = trust
        models = sorted(folder.glob("*mp_rank_*_model_states.pt"))
        if not models:
            raise CheckpointError(
                f"{folder} has a folder `zero` but no model file", expected="mp_rank_00_model_states.pt"
            )
        self._model_file = models[0].name
        self._model: Any = load_torch(models[0], trust=trust)
        self.world = len(self._ours.get("per_rank") or [None])
        self.degrees = {"dp": int(self._model.get("dp_world_size", 1)), "tp": 1, "pp": 1}
        self.tied: Mapping[str, str] = dict(self._model.get("shared_params") or {})
        self.optimizer = str((self._model.get("ds_config") or {}).get("optimizer", {}).get("type", ""))
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._group: dict[str, int] = {}  # each pipeline stage's file names its own parameters
        for path in models:
            groups = load_torch(path, trust=trust).get(k.PARAM_SHAPES) or []
            self._group |= {name: index for index, names in enumerate(groups) for name in names}
            self._shapes |= {name: tuple(shape) for names in groups for name, shape in names.items()}
        buffers = set(self._model.get(k.BUFFER_NAMES) or ())
        module = {n: t for n, t in (self._model.get("module") or {}).items() if isinstance(t, torch.Tensor)}
        self._fragments = self._frozen_fragments(models)
        # Asked for by name, not listed: a name with a slash is a folder in a folder.
        names = sorted({*self._group, *module, *self._fragments})
        places = {name: inside(folder / "zero", name, "a tensor's name") for name in names}
        folders = {name: path for name, path in places.items() if path.is_dir()}
        self.flats = tuple(self._flat(n, p) for n, p in folders.items() if n in self._group)
        self.flats += tuple(
            self._frozen(n, parts) for n, parts in self._fragments.items() if n not in folders
        )
        kinds = dict.fromkeys(self._group, "param") | dict.fromkeys(buffers, "buffer")
        self.module = tuple(
            TensorEntry(n, tuple(t.shape), _dtype(t), kinds.get(n, "frozen"), self._model_file)
            for n, t in module.items()
            if n not in self.tied
            and n not in self._fragments
            and (t.numel() or n in buffers or n not in folders)
        )
        self.dtype = next((e.dtype for e in self.module if e.kind == "param"), "float32")

    @property
    def universal_info(self) -> Mapping[str, Any] | None:
        """The model file's rules, else those that the parameters' own files give: DeepSpeed writes only these."""
        given = rules_in(self._model)
        if given is not None:
            return given
        rules: dict[str, Any] = {}
        for flat in self.flats:
            held = load_torch(self.folder / "zero" / flat.name / f"{FP32}.pt", trust=self._trust)
            held = held if isinstance(held, dict) else {}
            key = ""
            if held.get(k.CAT_DIM) is None:
                key = k.TP_REPLICATED_PARAMETER_PATTERNS
            elif held.get(k.PARAM_N_SUB_PARAMS) == 2:
                key = k.PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0
            elif held[k.CAT_DIM] == 1:
                key = k.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS
            elif held.get(k.VOCAB_TENSOR):
                key = k.VOCABULARY_PARAMETER_PATTERNS
                rules[k.ORIGINAL_VOCAB_SIZE] = flat.layout.tensors[0].shape[0]
            if key:
                rules.setdefault(key, []).append(re.escape(flat.name) + "$")
        return rules or None

    @property
    def param_groups(self) -> tuple[dict[str, Any], ...]:
        groups = self._common.get(k.PARAM_GROUPS) or ()
        return tuple({key: v for key, v in group.items() if key != "params"} for group in groups)

    def rest(self, tp_rank: int = 0) -> ModuleRest:
        module, ours = self._model.get("module") or {}, self._model.get(OURS) or {}
        plain = {key: v for key, v in module.items() if not isinstance(v, torch.Tensor)}
        return rest_back(ours, plain)

    def flat_tensor(self, entry: FlatEntry, shard: int, key: str) -> torch.Tensor:
        if key == PARAM:
            return self._fragments[entry.name][shard]
        return self._read(entry.name, key).reshape(-1)

    def flat_scalars(self, entry: FlatEntry) -> dict[str, Any]:
        further = self._numbers.get(entry.name) or {}
        path = self.folder / "zero" / entry.name / f"{STEP}.pt"
        if path.exists():
            return {STEP: load_torch(path, trust=self._trust)} | further
        return (self._common_scalars if FP32 in entry.keys else {}) | further

    @cached_property
    def _common(self) -> dict[str, Any]:
        path = self.folder / "zero" / "optimizer_state.pt"
        return load_torch(path, trust=self._trust) if path.exists() else {}

    @cached_property
    def _ours(self) -> Mapping[str, Any]:
        """What ``universal.write`` keeps beyond DeepSpeed's form; {} where DeepSpeed wrote the folder."""
        path = self.folder / OUR_FILE
        return load_torch(path, trust=self._trust) if path.exists() else {}

    @cached_property
    def _numbers(self) -> Mapping[str, dict[str, Any]]:
        return decode(self._ours.get("numbers") or {}, "numbers", {})

    @cached_property
    def _common_scalars(self) -> dict[str, Any]:
        """At stage 3 DeepSpeed keeps one step count for all, beside the hyperparameters."""
        tree = self._common
        states: dict[Any, Any] = (tree.get(k.OPTIMIZER_STATE_DICT) or tree).get("state") or {}
        for state in states.values():
            if STEP in state:
                return {STEP: state[STEP]}
        return {}

    def module_tensor(self, entry: TensorEntry) -> torch.Tensor:
        return self._model["module"][entry.name]

    def train_state(self, rank: int) -> TrainState:
        model, per_rank = self._model, self._ours.get("per_rank") or []
        known = KNOWN_KEYS | {k.UNIVERSAL_CHECKPOINT_INFO, OURS}
        rest = {
            "lr_scheduler": model.get("lr_scheduler"),
            CLIENT: {key: value for key, value in model.items() if key not in known},
        } | training_back(model.get(OURS) or {}, {})
        return TrainState(
            global_steps=int(model.get("global_steps", 0)),
            global_samples=int(model.get("global_samples", 0)),
            skipped_steps=int(model.get("skipped_steps", 0)),
            micro_steps=int(self._ours.get("micro_steps") or 0),
            per_rank=per_rank[rank] if rank < len(per_rank) else {},
            ds_config=model.get("ds_config") or {},
            **rest,
        )

    def _flat(self, name: str, folder: Path) -> FlatEntry:
        keys = {path.stem: "" for path in sorted(folder.glob("*.pt")) if path.stem != STEP}
        if FP32 not in keys:
            raise CheckpointError(f"{folder} has no fp32.pt", fix="convert the checkpoint again")
        tensors = {key: self._read(name, key) for key in keys}
        shape = tuple(tensors[FP32].shape)
        given = self._shapes.get(name, shape)
        if torch.Size(given).numel() == tensors[FP32].numel():
            shape = given  # DeepSpeed writes the parameters of stage 3 as 1D
        spec = TensorSpec(name, shape, "float32")
        dtypes = {key: _dtype(t) for key, t in tensors.items()}
        return FlatEntry(name, 0, self._group[name], FlatShards((spec,), 1), dtypes, {}, (f"zero/{name}",))

    def _frozen_fragments(self, models: list[Path]) -> dict[str, list[torch.Tensor]]:
        """Frozen parameters of stage 3: the converter leaves them in shards, in every rank's model file."""
        if not all(path.name.startswith(k.ZERO_FILE_PREFIX) for path in models):
            return {}
        found: dict[str, list[torch.Tensor]] = {}
        for path in sorted(models, key=lambda path: int(path.name.split("_")[3])):
            for name, part in (
                load_torch(path, trust=self._trust).get(k.FROZEN_PARAM_FRAGMENTS) or {}
            ).items():
                found.setdefault(name, []).append(part.reshape(-1))
        return found

    def _frozen(self, name: str, parts: list[torch.Tensor]) -> FlatEntry:
        shape = tuple((self._model.get(k.FROZEN_PARAM_SHAPES) or {})[name])
        layout = FlatShards((TensorSpec(name, shape, _dtype(parts[0])),), len(parts))
        return FlatEntry(name, 0, 0, layout, {PARAM: _dtype(parts[0])}, {}, (self._model_file,) * len(parts))

    def _read(self, name: str, key: str) -> torch.Tensor:
        place = inside(self.folder / "zero", name, "a tensor's name")
        held = load_torch(place / f"{key}.pt", trust=self._trust)
        return held[k.PARAM] if isinstance(held, dict) else held


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
