"""Checkpoints as somebody who means harm would write them: other names, with checksums that fit."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint.save.files import checksum_text
from zeropipe.checkpoint.save.records import _BLANK, MANIFEST_NAME, _own

MODEL = "mp_rank_00_model_states.pt"


def rewrite_manifest(folder: Path, *, rename: Mapping[str, str] | None = None, **names: str) -> None:
    """``rename``: tensors of the module, in the files too. ``names``: what the first entry of a field names."""
    path = folder / MANIFEST_NAME
    data: dict[str, Any] = json.loads(path.read_text())
    if rename:
        tree = torch.load(folder / MODEL, weights_only=False)
        for old, new in rename.items():
            tree["module"][new] = tree["module"].pop(old)
            for entry in data["module"]:
                entry["name"] = new if entry["name"] == old else entry["name"]
        torch.save(tree, folder / MODEL)
        content = (folder / MODEL).read_bytes()
        data["files"][MODEL] = {"bytes": len(content), "checksum": checksum_text(zlib.crc32(content))}
    for field, name in names.items():
        if field == "files":
            data["files"][name] = data["files"].pop(MODEL)
        elif field == "module":
            data["module"][0]["file"] = name
        elif field == "flats":
            data["flats"][0]["files"][0] = name
        elif field == "rank_files":
            data["rank_files"][0] = name
        elif field == "state_key":
            data["flats"][0]["keys"][name] = "float32"
    data["checksum"] = _BLANK
    text = json.dumps(data, indent=1)
    path.write_text(text.replace(_own(_BLANK), _own(checksum_text(zlib.crc32(text.encode())))))
