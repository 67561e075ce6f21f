"""Where transformers reads a checkpoint into a model in shards: ``PreTrainedModel._load_pretrained_model``.

Its own code for stage 3 has rank 0 read everything, every rank gather every parameter to be written, and three state
dicts made, each a whole model. In its place:

    [1] parameters make room for tensors on meta, so that the model looks as it does without stage 3
    [2] transformers' own code names, converts and assigns what the files have: ``Planned`` tensors, no byte is read
    [3] the parameters return, and each takes what stands in its place: this rank's elements, read from the files

What [2] reports (missing, unexpected, mismatched) is so what it reports without stage 3, and what goes on from there.
Where transformers' functions are others than those known here, it goes its own way.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any
from zipfile import is_zipfile

import torch

from zeropipe.comm.collectives import all_gather_object
from zeropipe.compat.pretrained.planned import Planned
from zeropipe.compat.pretrained.planned import planned as plan_of
from zeropipe.errors import CheckpointError
from zeropipe.layout.mosaic import Mosaic
from zeropipe.runtime.zero.gather.shards import Shards, shards_in, shards_of
from zeropipe.runtime.zero.gather.weights import Loading
from zeropipe.tensor.weight_files import Reader, Stored

logger = logging.getLogger(__name__)
_TAKES = ("model", "state_dict", "checkpoint_files", "load_config", "expected_keys")
_CONVERTS = ("model", "state_dict", "load_config", "disk_offload_index")
# Where a module keeps a tensor, and under which name.
Slot = tuple[dict[str, Any], str]


def stream_pretrained() -> None:
    """Have ``from_pretrained`` read into shards, if transformers is here. May be repeated."""
    modeling, core = (
        sys.modules.get(f"transformers.{name}") for name in ("modeling_utils", "core_model_loading")
    )
    owner: Any = getattr(modeling, "PreTrainedModel", None)
    original = getattr(owner, "_load_pretrained_model", None)
    convert = getattr(core, "convert_and_load_state_dict_in_model", None)
    if original is None or hasattr(original, "streams"):
        return
    if convert is None or _names(original) != _TAKES or _names(convert) != _CONVERTS:
        logger.info(
            "this version of transformers reads checkpoints its own way at stage 3: on rank 0, all of it"
        )
        return

    @wraps(original)
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Any:
        if state_dict is None and checkpoint_files and _can_stream(model, checkpoint_files, load_config):
            return _load(model, checkpoint_files, load_config, convert), None
        return original(model, state_dict, checkpoint_files, load_config, expected_keys)

    _load_pretrained_model.streams = True  # type: ignore[attr-defined]
    owner._load_pretrained_model = staticmethod(_load_pretrained_model)


def _names(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _can_stream(model: Any, files: list[str], load_config: Any) -> bool:
    if not shards_in(model) or load_config.is_quantized or load_config.device_map is not None:
        return False
    # Files of torch: those of before 1.6, or with more than tensors in them, only its own loader reads.
    return all(
        file.endswith(".safetensors") or (load_config.weights_only and is_zipfile(file)) for file in files
    )


def _load(model: Any, files: list[str], load_config: Any, convert: Any) -> Any:
    """Fill ``model`` from ``files``; returns transformers' report. Collective."""
    with Reader() as reader:
        loading = Loading(reader, shards_in(model)[0].everyone, "from_pretrained")
        report, _ = _converted(model, loading.opened(files), load_config, convert, loading)
        _settle_ties(model, report, loading)
    return report


def _converted(
    model: Any, stored: Mapping[str, Stored], load_config: Any, convert: Any, loading: Loading
) -> tuple[Any, list[torch.Tensor]]:
    """Fill ``model`` as transformers says; returns its report, and what was filled. Collective."""
    planned = {key: Planned.stored(one, loading) for key, one in stored.items()}
    with _on_meta(model) as places:
        report, _ = convert(model=model, state_dict=planned, load_config=load_config, disk_offload_index=None)
        found = [
            (tensor, here) for (kind, name), tensor, shown in places if (here := kind[name]) is not shown
        ]
    _fill(loading, found)
    return report, [tensor for tensor, _ in found]


def load_converted(
    root: torch.nn.Module, stored: Mapping[str, Stored], loading: Loading
) -> tuple[set[str], set[str]] | None:
    """For ``zero.Init(weights=)``: fill a model of transformers from files of its checkpoints; collective.

    Returns the names that have no weights, and the keys (renamed) that are unused; None for any other model.
    Raises CheckpointError where a shape is another, or a conversion failed.
    """
    modeling, core, mapping = (
        sys.modules.get(f"transformers.{name}")
        for name in ("modeling_utils", "core_model_loading", "conversion_mapping")
    )
    convert = getattr(core, "convert_and_load_state_dict_in_model", None)
    if not hasattr(root, "_load_pretrained_model") or convert is None or _names(convert) != _CONVERTS:
        return None
    conversions = mapping.get_model_conversion_mapping(root)  # type: ignore[union-attr]
    load_config = modeling.LoadStateDictConfig(weight_mapping=conversions)  # type: ignore[union-attr]
    report, filled = _converted(root, stored, load_config, convert, loading)
    if report.mismatched_keys or report.conversion_errors:
        mismatched = [
            f"{name}: {tuple(there)}, not {tuple(here)}" for name, there, here in report.mismatched_keys
        ]
        said = "; ".join([*sorted(mismatched), *map(str, report.conversion_errors.values())])
        raise CheckpointError(
            f"zero.Init: weights that do not fit the {type(root).__name__}: {said}",
            fix="build the model with the configuration that the weights were saved with",
        )
    ids = {id(tensor) for tensor in filled}
    names = {name for name, tensor in root.state_dict(keep_vars=True).items() if id(tensor) in ids}
    return report.missing_keys - names, report.unexpected_keys


@contextmanager
def _on_meta(model: torch.nn.Module) -> Iterator[list[tuple[Slot, torch.Tensor, torch.Tensor]]]:
    """Where each tensor of ``model`` is kept, the tensor, and what is there meanwhile."""
    places: list[tuple[Slot, torch.Tensor, torch.Tensor]] = []
    shown: dict[torch.Tensor, torch.Tensor] = {}  # tied ones stay so
    for module in model.modules():
        kinds: tuple[dict[str, Any], ...] = module._parameters, module._buffers
        for kind in kinds:
            for name, tensor in kind.items():
                if tensor is not None:
                    like = shown.setdefault(tensor, _shown(tensor))
                    places.append(((kind, name), tensor, like))
    try:
        for (kind, name), _, like in places:
            kind[name] = like
        yield places
    finally:
        for (kind, name), tensor, _ in places:
            kind[name] = tensor


def _shown(tensor: torch.Tensor) -> torch.Tensor:
    """In place of a parameter in shards: its shape and dtype, and what was said of it."""
    shards = shards_of(tensor)
    if shards is None:
        return tensor
    like = torch.nn.Parameter(
        torch.empty(shards.shape, dtype=shards.dtype, device="meta"), tensor.requires_grad
    )
    like.__dict__.update({name: value for name, value in tensor.__dict__.items() if name != "_zero"})
    return like


@torch.no_grad()
def _fill(loading: Loading, found: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Let each tensor have the value that was assigned in its place; collective."""
    sharded: dict[Shards, Mosaic] = {}
    for tensor, value in found:
        shards, plan = shards_of(tensor), plan_of(value)
        if shards is not None and plan is not None and plan.mosaic is not None:
            sharded[shards] = plan.mosaic
    loading.into_shards(sharded)
    for tensor, value in found:
        shards, plan = shards_of(tensor), plan_of(value)
        if shards is None:
            tensor.copy_(value if plan is None else plan.now())
        elif shards not in sharded:
            shards.write(value if plan is None else plan.now())
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers initializes the others


def _settle_ties(model: Any, report: Any, loading: Loading) -> None:
    """Of parameters that are to be tied and have both been read: tie equal ones, and leave the others apart."""
    # transformers compares values, which are not here; told that one is missing it ties them.
    ties = getattr(model, "all_tied_weights_keys", {})
    for target, source in list(ties.items()):
        if target in report.missing_keys or source in report.missing_keys:
            continue
        pair = [shards_of(model.get_parameter(name)) for name in (target, source)]
        if pair[0] is pair[1] or pair[0] is None or pair[1] is None:
            continue
        alike = pair[0].shape == pair[1].shape and torch.equal(pair[0].source, pair[1].source)
        if all(all_gather_object(alike, loading.group, label=f"{target} and {source}")):
            report.missing_keys.add(target)
        else:
            ties.pop(target)
            said = "%s and %s are to be tied by the configuration but differ in the files: they stay two parameters"
            logger.warning(said, target, source)
