"""Weights out of files into a model in shards: each rank reads its own elements of each tensor, and nothing else.

    [1] together   which tensor lies where (headers only); every rank sees the same files, and says so
    [2] alike      what of it is which parameter or buffer, what is missing, what does not fit
    [3] alone      a shard's elements: read into the shard, nothing is sent
    [4] together   what every rank holds whole (buffers, plain parameters): each reads its part, all gather
    [5] alike      modules with loading code of their own get whole values, one module at a time

A rank that raises in [1] or [3] tells the others, and all raise the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

import torch

from zeropipe.comm.agreement import agree, together
from zeropipe.comm.collectives import all_gather
from zeropipe.comm.group import Group
from zeropipe.errors import CheckpointError, UsageError
from zeropipe.layout.flat import FlatShards, flat_shards
from zeropipe.layout.mosaic import Mosaic
from zeropipe.names import lazy
from zeropipe.runtime.zero.gather.shards import Shards, shards_of
from zeropipe.runtime.zero.gather.state_dict import is_ours
from zeropipe.tensor.weight_files import Reader, Stored, Weights, open_weights

logger = logging.getLogger(__name__)
_SHOWN = 8  # names in a message


class Loading:
    """One load, by the ranks of ``group``. ``what`` it is called in errors."""

    def __init__(self, reader: Reader, group: Group, what: str) -> None:
        self._reader, self.group, self.what = reader, group, what

    def together(self, label: str, work: Callable[[], None]) -> None:
        """Do ``work``, which communicates nothing. Raises CheckpointError on every rank where it raised on one."""
        fix = "see that every rank can read the files"
        told = CheckpointError, UsageError
        _, errors = together(self.group, label, work, f"{self.what}: {label}", fix, *told)
        if errors:
            raise CheckpointError(errors[0])

    def opened(self, weights: Weights) -> dict[str, Stored]:
        """What is in the files, which are the same on every rank; collective."""
        stored: dict[str, Stored] = {}
        self.together("opening the weights", lambda: stored.update(open_weights(weights)))
        agree(
            {f"'{key}' of the weights": f"{one.dtype} {one.shape}" for key, one in stored.items()}, self.group
        )
        return stored

    def into_shards(self, values: Mapping[Shards, Mosaic]) -> None:
        """Let the shards be those of ``values``; collective."""

        def read() -> None:
            for shards, mosaic in values.items():
                with shards.own.anew(shards.full.device) as shard:
                    self._read(mosaic, shards.layout, shards.group, shard)

        self.together("reading the weights", read)
        for shards in values:
            if shards.gathered:
                settled = shards.settled().view(-1)
                shards.renewed()[: settled.numel()].copy_(settled)

    def whole(self, name: str, mosaic: Mosaic, like: torch.Tensor) -> torch.Tensor:
        """``mosaic`` in the shape, dtype and device of ``like``, of which each rank reads a part; collective."""
        dtype = str(like.dtype).removeprefix("torch.")
        layout = flat_shards([(name, tuple(like.shape), dtype)], self.group.size)
        full = torch.zeros(layout.padded_numel, dtype=like.dtype, device=like.device)
        start, stop = layout.shard_range(self.group.rank)
        own = full[start:stop]
        self.together(f"reading {name}", lambda: self._read(mosaic, layout, self.group, own))
        # As bytes: a buffer may have a dtype that no backend sends.
        all_gather(full.view(torch.uint8), own.view(torch.uint8), self.group, label=name).wait()
        return full[: layout.numel].view(like.shape)

    def _read(self, mosaic: Mosaic, layout: FlatShards, group: Group, out: torch.Tensor) -> None:
        for piece in layout.pieces(group.rank):
            self._reader.fill(mosaic, piece.start, out[piece.offset : piece.offset + piece.numel])


def load_built(
    weights: Weights, group: Group, built: list[torch.nn.Module], unset: list[torch.nn.Module]
) -> None:
    """Fill the one model among the modules that were ``built``; collective. Raises as ``load_weights``, and UsageError
    for more models than one, and for a tensor of an ``unset`` module that has no weights."""
    below = {child for module in built for child in module.children()}
    roots = [module for module in built if module not in below and _targets(module)]
    if len(roots) != 1:
        raise UsageError(
            "zero.Init(weights=): the weights are of one model",
            expected="one that is built inside the context",
            found=", ".join(type(root).__name__ for root in roots) or "none",
            fix="build each model in a context of its own, with its weights",
        )
    missing = load_weights(roots[0], weights, group)
    missing |= {name for name, _ in roots[0].named_buffers()} - _targets(roots[0]).keys()  # no file has these
    starts = [prefix and f"{prefix}." for prefix, module in roots[0].named_modules() if module in unset]
    empty = [name for name in missing if name[: name.rfind(".") + 1] in starts]
    if empty:
        raise UsageError(
            f"zero.Init(weights=): no weights for {_few(empty)}, and no values from the model on meta",
            fix="name files that have them, or give the module a reset_parameters() that makes them",
        )


def load_weights(root: torch.nn.Module, weights: Weights, group: Group) -> set[str]:
    """Fill the parameters and persistent buffers of ``root``, whose names are the keys, or what transformers
    makes of these for a model of its own; collective.

    Returns the names that have no weights; those keep their values, and a warning names them and keys that are unused.
    Raises CheckpointError, alike on every rank: files that cannot be read, another shape, a dtype that cannot be cast;
    UsageError: no key is a name of the model.
    """
    with Reader() as reader:
        loading = Loading(reader, group, "zero.Init")
        stored = loading.opened(weights)
        lookup, _ = lazy(__name__)
        missing, unused = lookup("load_converted")(root, stored, loading) or _by_name(root, stored, loading)
    if not _targets(root).keys() - missing:
        raise UsageError(
            f"zero.Init: no key of the weights is a name of the {type(root).__name__}",
            expected=_few(missing),
            found=_few(stored),
            fix="name the weights of this model, or from_pretrained where a library renames them",
        )
    if missing or unused:
        said = f"{len(missing)} names have no weights: {_few(missing)}; {len(unused)} keys are unused: {_few(unused)}"
        logger.warning("zero.Init: %s", said)
    return missing


def _by_name(
    root: torch.nn.Module, stored: Mapping[str, Stored], loading: Loading
) -> tuple[set[str], set[str]]:
    """The names that have no weights, and the keys that are unused."""
    targets, custom = _targets(root), _with_own_code(root)
    inside = tuple(prefix and f"{prefix}." for prefix in custom)
    plain = {name: stored[name] for name in targets if name in stored and not name.startswith(inside)}
    for name, one in plain.items():
        _check(name, one, targets[name])
    # Of tied parameters the last name counts, as in ``load_state_dict``.
    loading.into_shards(
        {shards: one.mosaic for name, one in plain.items() if (shards := shards_of(targets[name]))}
    )
    with torch.no_grad():
        for name, one in plain.items():
            if shards_of(targets[name]) is None:
                targets[name].copy_(loading.whole(name, one.mosaic, targets[name]))
        unused = {key for key in stored.keys() - plain.keys() if not key.startswith(inside)}
        filled = {targets[name] for name in plain}  # tied ones by any of their names
        missing = {name for name in targets if targets[name] not in filled and not name.startswith(inside)}
        for prefix, module in custom.items():
            more = _load_own(loading, prefix, module, stored)
            missing |= more[0]
            unused |= more[1]
    return missing, unused


def _targets(root: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by every name that they have."""
    found: dict[str, torch.Tensor] = dict(root.named_parameters(remove_duplicate=False))
    for prefix, module in root.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _check(name: str, stored: Stored, target: torch.Tensor) -> None:
    shards = shards_of(target)
    shape, dtype = (target.shape, target.dtype) if shards is None else (shards.shape, shards.dtype)
    where = f"weights: key '{name}' of {stored.path}"
    if stored.shape != tuple(shape):
        raise CheckpointError(
            where,
            expected=f"shape {tuple(shape)}",
            found=stored.shape,
            fix="build the model with the configuration that the weights were saved with",
        )
    wide = all(one.is_floating_point and one.itemsize > 1 for one in (stored.dtype, dtype))
    if stored.dtype != dtype and not wide:
        raise CheckpointError(
            where,
            expected=f"{dtype}, or a floating-point dtype of 16 bits or more that can be cast to it",
            found=stored.dtype,
            fix="codes of few bits mean nothing without their scales: save the weights dequantized",
        )


def _with_own_code(root: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The outermost modules that rename, pack or compute what is loaded, or keep more than tensors."""
    found: dict[str, torch.nn.Module] = {}
    for prefix, module in root.named_modules():
        inside = any(prefix.startswith(f"{one}.") or not one for one in found)
        if not inside and _loads_itself(module):
            found[prefix] = module
    return found


def _loads_itself(module: torch.nn.Module) -> bool:
    hooks = (*module._load_state_dict_pre_hooks.values(), *module._load_state_dict_post_hooks.values())
    if any(not is_ours(hook) for hook in hooks):
        return True
    kind = type(module)
    names = ("_load_from_state_dict", "load_state_dict", "set_extra_state")
    return not kind.__module__.startswith("torch.nn.modules.") and any(
        getattr(kind, name) is not getattr(torch.nn.Module, name) for name in names
    )


def _load_own(
    loading: Loading, prefix: str, module: torch.nn.Module, stored: Mapping[str, Stored]
) -> tuple[set[str], set[str]]:
    """Let the module load its part itself; returns the names that it misses, and the keys that it has no use for."""
    start = f"{prefix}." if prefix else ""
    state = {
        key.removeprefix(start): loading.whole(key, one.mosaic, torch.empty(one.shape, dtype=one.dtype))
        for key, one in stored.items()
        if key.startswith(start)
    }
    missing, unused = module.load_state_dict(state, strict=False)
    return {start + name for name in missing}, {start + key for key in unused}


def _few(names: Iterable[str]) -> str:
    every = sorted(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return (", ".join(every[:_SHOWN]) or "none") + more
