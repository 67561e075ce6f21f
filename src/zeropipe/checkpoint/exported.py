"""Which files of weights in a folder are exports of ours, and which would be read in place of a new one.

A reader such as transformers takes the first of four names that is there. So an older export under another of these
names has to go, but only if it is ours: its header, its index or its state dict says so.
"""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

from zeropipe.checkpoint.files import load_torch
from zeropipe.errors import CheckpointError

METADATA = {"format": "pt", "writer": "zeropipe"}
# In the order in which readers look for them.
_ENTRIES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SHARD = re.compile(r"^(model-\d{5}-of-\d{5}\.safetensors|pytorch_model-\d{5}-of-\d{5}\.bin)$")
_MAX_HEADER = 100_000_000  # bytes; the format's own limit


def index_text(where: dict[str, str], total: int) -> str:
    """The index of an export in several files."""
    metadata = {"total_size": total, "writer": METADATA["writer"]}
    return json.dumps({"metadata": metadata, "weight_map": where}, indent=1)


def marked(state: OrderedDict[str, Any]) -> OrderedDict[str, Any]:
    """A state dict that says who wrote it, as an attribute: its keys are the module's alone."""
    state.writer = METADATA["writer"]  # type: ignore[attr-defined]
    return state


def in_the_way(folder: Path, new: tuple[str, ...]) -> list[Path]:
    """Our older exports in ``folder`` that files named ``new`` will not replace.

    Raises CheckpointError where a file that is not ours has one of these names, or would be read before them.
    """
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
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size < min(_MAX_HEADER, os.fstat(file.fileno()).st_size):
                return json.loads(file.read(size))["__metadata__"]["writer"] == METADATA["writer"]
    return False
