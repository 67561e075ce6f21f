"""Writes a checkpoint's weights as ordinary files: safetensors or torch, in shards, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import torch

from zeropipe.checkpoint.save.files import Hold, Output, load_torch, new_file, sync_folder
from zeropipe.checkpoint.save.ownership import begin, clear_left, discard, whole_or_nothing
from zeropipe.checkpoint.sources import Checkpoint
from zeropipe.checkpoint.sources.parallel import Weight, weights
from zeropipe.errors import CheckpointError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# safetensors' names of dtypes: https://huggingface.co/docs/safetensors
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_UNITS = {"": 1, "B": 1} | {
    f"{unit}{binary}B": base**power
    for power, unit in enumerate("KMGT", 1)
    for binary, base in (("", 1000), ("I", 1024))
}
METADATA = {"format": "pt", "writer": "zeropipe"}
# A reader such as transformers takes the first of these names that is there. So an older export under another of them
# has to go, but only if it is ours: its header, its index or its state dict says so.
_ENTRIES = tuple(
    name + index for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")
)
_SHARD = re.compile(r"^(model-\d{5}-of-\d{5}\.safetensors|pytorch_model-\d{5}-of-\d{5}\.bin)$")
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_WORK = "export"  # what the work folders of exports are for, by their names
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class _Item:
    """One name in the output; several may read the same weight."""

    name: str
    weight: Weight
    dtype: torch.dtype
    nbytes: int


def parse_size(text: str | int) -> int:
    """``5GB``, ``500MB``, ``1GiB`` or a number of bytes. Raises CheckpointError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?I?B?)\s*", str(text).upper(), re.ASCII)
    size = int(float(match[1]) * _UNITS.get(match[2], 0)) if match else 0
    if size < 1:
        raise CheckpointError("the size of a shard", expected="e.g. 5GB or 500MB", found=repr(text))
    return size


def export(
    source: Checkpoint,
    output: str | os.PathLike[str],
    *,
    dtype: str = "fp32",
    max_shard_size: str | int = "5GB",
    safetensors: bool = True,
    exclude_frozen: bool = False,
    tied: str = "repeat",
    progress: Progress = lambda done: None,
) -> list[Path]:
    """Write the weights into the folder ``output``; the files written, the index last.

    ``dtype``: ``fp32``, ``bf16`` or ``fp16``; integer tensors keep theirs. ``tied``: ``repeat`` writes a tied
    tensor under each of its names, so that a strict load works anywhere; ``drop`` only under the first, and
    lists the others in the files' metadata. ``progress`` gets the bytes of each tensor written.
    Memory: one tensor for safetensors, one shard for torch's format. An older export in the folder goes once the
    new one is written. Raises CheckpointError for an unknown dtype, for files of somebody else that readers would
    take for these weights or that have their names, and where the disk is full; nothing is changed then.
    """
    if dtype not in DTYPES:
        raise CheckpointError("dtype of the export", expected=", ".join(DTYPES), found=dtype)
    items: list[_Item] = []
    for weight in weights(source, exclude_frozen=exclude_frozen):
        out = DTYPES[dtype] if weight.dtype.is_floating_point else weight.dtype
        size = torch.Size(weight.shape).numel() * out.itemsize
        names = source.names_of(weight.name) if tied == "repeat" else [weight.name]
        items += [_Item(name, weight, out, size) for name in names]
    # Sizes follow from shapes alone, so files are cut before a byte is read.
    shards = _cut(items, parse_size(max_shard_size))
    folder = Path(output)
    stem, suffix = ("model", "safetensors") if safetensors else ("pytorch_model", "bin")
    dropped = dict(source.tied) if tied == "drop" else {}
    where: dict[str, str] = {}
    contents: dict[str, Callable[[Output], object]] = {}
    for number, shard in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        name = f"{stem}{part}.{suffix}"
        fill = partial(_write_safetensors, dropped=dropped) if safetensors else _write_torch
        contents[name] = partial(fill, shard=shard, progress=progress)
        where |= {item.name: name for item in shard}
    if len(shards) > 1:
        metadata = {"total_size": sum(item.nbytes for item in items), "writer": METADATA["writer"]}
        text = json.dumps({"metadata": metadata, "weight_map": where}, indent=1).encode()
        contents[f"{stem}.{suffix}.index.json"] = lambda output: output.write(text)
    return _put(folder, contents)


def _put(folder: Path, contents: dict[str, Callable[[Output], object]]) -> list[Path]:
    """Write the files and let them take the place of an older export; nothing is left where that fails.

    Several ranks may do so at once: each writes in a folder of its own, and what they put in place is the same.
    """
    old: list[Path] = []
    # Folders that are made here, the innermost first: they go again, as far as nobody has put anything there.
    made = [path for path in (folder, *folder.parents) if not path.exists()]

    def start() -> tuple[Path, Hold]:
        folder.mkdir(parents=True, exist_ok=True)
        old.extend(_in_the_way(folder, tuple(contents)))
        clear_left(folder, _WORK)  # of an export that was killed
        return begin(folder / _WORK)

    try:
        with whole_or_nothing(folder, start) as work:
            for name, fill in contents.items():
                with new_file(work / name) as output:
                    fill(output)
            for path in old:  # first: half an export must not look like a whole older one
                path.unlink(missing_ok=True)
            for name in contents:
                os.replace(work / name, folder / name)
            discard(work)
            sync_folder(folder)
    except BaseException:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise
    return [folder / name for name in contents]


def _cut(items: Iterable[_Item], limit: int) -> list[list[_Item]]:
    """Shards of at most ``limit`` bytes, in order; a larger tensor is a shard of its own."""
    shards: list[list[_Item]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    return shards


def _write_safetensors(
    output: Output, shard: Sequence[_Item], progress: Progress, dropped: dict[str, str]
) -> None:
    """Eight bytes of header size, the header as JSON, then the tensors end to end, little-endian."""
    header: dict[str, Any] = {"__metadata__": METADATA | dropped}
    at = 0
    for item in shard:
        if item.dtype not in _NAMES:
            raise CheckpointError(f"{item.name} has dtype {item.dtype}, which safetensors cannot hold")
        header[item.name] = {
            "dtype": _NAMES[item.dtype],
            "shape": list(item.weight.shape),
            "data_offsets": [at, at + item.nbytes],
        }
        at += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # Readers map the tensors: the format wants them to begin at a multiple of eight.
    text += b" " * (-len(text) % 8)
    output.write(len(text).to_bytes(8, "little"))
    output.write(text)
    for item in shard:
        value = item.weight.read(item.dtype).contiguous()
        if value.numel():
            output.write(value.view(-1).view(torch.uint8).numpy().data)
        progress(item.nbytes)


def _write_torch(output: Output, shard: Sequence[_Item], progress: Progress) -> None:
    values: dict[int, torch.Tensor] = {}
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    # It says who wrote it as an attribute: its keys are the module's alone.
    state.writer = METADATA["writer"]  # type: ignore[attr-defined]
    # A tied tensor is one tensor in the file too: torch writes a storage once.
    for item in shard:
        if id(item.weight) not in values:
            values[id(item.weight)] = item.weight.read(item.dtype)
        state[item.name] = values[id(item.weight)]
        progress(item.nbytes)
    torch.save(state, cast("IO[bytes]", output))


def _in_the_way(folder: Path, new: tuple[str, ...]) -> list[Path]:
    """Our older exports in ``folder`` that files named ``new`` will not replace.

    Raises CheckpointError where a file that is not ours has one of these names, or would be read before them.
    """
    # What a reader would take first of the new files: all that comes before it would hide them.
    first = min(_ENTRIES.index(name) for name in new if name in _ENTRIES)
    old: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name not in _ENTRIES and not _SHARD.match(path.name):
            continue
        if _is_ours(path):
            if path.name not in new:
                old.append(path)
        elif path.name in (*new, *_ENTRIES[:first]) and os.path.lexists(path):  # a peer may have removed it
            raise CheckpointError(
                f"{path} stands in the way of the export",
                expected="nothing, or an earlier export of zeropipe",
                found="a file whose writer is not known, which would be lost or be read in place of the new one",
                fix="give another folder, or remove it yourself",
            )
    return old


def _is_ours(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with suppress(OSError, ValueError, KeyError, TypeError, CheckpointError, AttributeError):
        if path.name.endswith(".json"):
            return json.loads(path.read_text(encoding="utf-8"))["metadata"]["writer"] == METADATA["writer"]
        if path.name.endswith(".bin"):
            return getattr(load_torch(path), "writer", None) == METADATA["writer"]
        # The header alone; its size comes first, and may be anything where the file is none of this format.
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size < min(_MAX_HEADER, os.fstat(file.fileno()).st_size):
                return json.loads(file.read(size))["__metadata__"]["writer"] == METADATA["writer"]
    return False
