"""What a save says beside its tensors, in words, and what of it only code can restore, named by its path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zeropipe.checkpoint.save.files import pickled, unpickled
from zeropipe.checkpoint.save.plain import below, decode, encode, name_of
from zeropipe.checkpoint.save.records import CLIENT, FlatState, LocalState, ModelState, ModuleRest, TrainState
from zeropipe.errors import describe

_OF_TRAINING = ("lr_scheduler", "loss_scaler", "common", CLIENT)


@dataclass(frozen=True, slots=True)
class Objects:
    """What of a state needs code. ``told``: path -> a line for the log; ``refused``: why it cannot be saved, or ""."""

    told: dict[str, str]
    refused: str = ""


def training_words(train: TrainState, code: dict[str, Any]) -> dict[str, Any]:
    """Everything of ``train`` that is not a count; what needs code goes to ``code``."""
    return {name: encode(getattr(train, name), name, code) for name in _OF_TRAINING}


def training_back(words: Mapping[str, Any], code: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a TrainState that ``training_words`` gave words for."""
    return {name: decode(words[name], name, code) for name in _OF_TRAINING if name in words}


def module_words(model: ModelState, code: dict[str, Any]) -> dict[str, Any]:
    """As ``rest_words``, of a module that is saved; what needs code goes to ``code``."""
    return {
        "extra": {key: encode(value, key, code) for key, value in model.extra.items()},
        "hidden": list(model.hidden),
        "versions": encode(model.versions, "versions", {}),
    }


def rest_words(rest: ModuleRest) -> dict[str, Any]:
    """What a state dict held beside its tensors, without what needs code."""
    words: dict[str, Any] = {"extra": {key: encode(value, key, {}) for key, value in rest.extra.items()}}
    words["hidden"] = sorted(rest.hidden)
    return words if rest.versions is None else words | {"versions": encode(rest.versions, "versions", {})}


def rest_back(
    words: Mapping[str, Any], plain: Mapping[str, Any], code: Mapping[str, Any] | None = None
) -> ModuleRest:
    """Back from ``rest_words``; ``plain``: extra state that stands in the state dict itself."""
    extra = {key: decode(value, key, code) for key, value in (words.get("extra") or {}).items()}
    versions = decode(words["versions"]) if "versions" in words else None
    return ModuleRest(dict(plain) | extra, versions, frozenset(words.get("hidden") or ()))


def groups_words(local: LocalState, code: dict[str, Any]) -> list[Any]:
    return list(encode(list(local.param_groups), "param_groups", code))


def scalars_words(flat: FlatState, code: dict[str, Any]) -> Any:
    """Optimizer state with one value for a whole flat."""
    return encode(flat.scalars, below("optimizer", flat.name), code)


def look_through(local: LocalState) -> Objects:
    """Find what needs code before anything is written. What cannot be pickled either is left out, and said so; in
    the client's own state, which would be lost, it is refused."""
    code: dict[str, Any] = {}
    training_words(local.train, code)
    module_words(local.model, code)
    groups_words(local, code)
    told: dict[str, str] = {}
    refused = ""
    unsaved: dict[str, Any] = {}
    for flat in local.flats:
        scalars_words(flat, unsaved)
    for path, value in unsaved.items():
        told[path] = describe(
            f"{path} is a {_kind(value)} in the optimizer's state: it is not saved and stays at its start on resume",
            fix="let the optimizer keep numbers, strings, tensors and containers of them",
        )
    for path, value in code.items():
        kind = _kind(value)
        try:
            pickled(value)
        except Exception as reason:
            text = describe(
                f"{path} cannot be saved: it holds a {kind}, and pickle says {reason}",
                fix="give numbers, strings, tensors and containers of them, and make the object from those",
            )
            if path == CLIENT or path.startswith((f"{CLIENT}.", f"{CLIENT}[")):
                refused = refused or text
            else:
                told[path] = f"{text}; it will stay at its start on resume"
        else:
            told[path] = describe(
                f"{path} is a {kind}, which only running code can restore: it comes back with "
                "load_checkpoint(..., trust=True) alone",
                fix="give numbers, strings, tensors and containers of them, and make the object from those",
            )
    return Objects(told, refused)


def _kind(value: Any) -> str:
    return ".".join(name_of(type(value)))


def objects(code: Mapping[str, Any], *, copy: bool) -> dict[str, Any]:
    """Those of ``code`` that pickle can write; with ``copy`` as they are now."""
    kept: dict[str, Any] = {}
    for path, value in code.items():
        try:
            data = pickled(value)
        except Exception:  # ``look_through`` has said so
            continue
        kept[path] = value
        if copy:
            kept[path] = unpickled(data)
    return kept
