"""The manifest's text is what it always was, to the byte, and says all of what it was made from."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.layout.strategies import layouts
from zeropipe.checkpoint.save.files import FileRecord, checksum_text
from zeropipe.checkpoint.save.records import _BLANK, FlatEntry, Manifest, TensorEntry, _own, united
from zeropipe.errors import CheckpointError
from zeropipe.frozen import from_json, to_json
from zeropipe.layout.flat import FlatShards, TensorSpec

LAYOUT = FlatShards((TensorSpec("w", (2, 3), "float32"),), 2, 4)
FILES = (FileRecord("f", 3, "crc32:00000000"), FileRecord("g", 4, "crc32:00000001"))
MANIFEST = Manifest(
    tag="a",
    stage=2,
    dtype="float32",
    optimizer="Adam",
    world=2,
    degrees={"dp": 2},
    global_steps=3,
    versions={"zeropipe": "1"},
    files=FILES,
    module=(TensorEntry("w", (2, 3), "float32", "param", "f"),),
    flats=(FlatEntry("x", 0, 1, LAYOUT, {"fp32": "float32"}, {"step": 3.5}, ("f", "g")),),
    tied={"v": "w"},
    excluded=("q",),
    rank_files=("f", "g"),
)
TEXT = {
    "format": 1,
    "tag": "a",
    "stage": 2,
    "dtype": "float32",
    "optimizer": "Adam",
    "world": 2,
    "degrees": {"dp": 2},
    "global_steps": 3,
    "versions": {"zeropipe": "1"},
    "files": {
        "f": {"bytes": 3, "checksum": "crc32:00000000"},
        "g": {"bytes": 4, "checksum": "crc32:00000001"},
    },
    "rank_files": ["f", "g"],
    "tied": {"v": "w"},
    "excluded": ["q"],
    "module": [
        {"name": "w", "shape": [2, 3], "dtype": "float32", "kind": "param", "file": "f", "mp_rank": 0}
    ],
    "flats": [
        {
            "name": "x",
            "mp_rank": 0,
            "group_index": 1,
            "keys": {"fp32": "float32"},
            "scalars": {"step": 3.5},
            "files": ["f", "g"],
            "layout": {
                "num_shards": 2,
                "align": 4,
                "tensors": [{"name": "w", "shape": [2, 3], "dtype": "float32"}],
            },
        }
    ],
    "checksum": "crc32:c14596c4",
}


def test_the_text_is_what_every_version_wrote() -> None:
    """Programs other than ours read it, and ``diff`` is of use on it, so the order of the keys counts too."""
    assert MANIFEST.to_text() == json.dumps(TEXT, indent=1)
    assert Manifest.from_text(MANIFEST.to_text(), Path("folder/zeropipe_manifest.json")) == MANIFEST


@given(layouts(), st.lists(st.sampled_from(["f", "g"]), max_size=3))
def test_frozen_data_comes_back_from_json(layout: FlatShards, names: list[str]) -> None:
    flat = replace(MANIFEST.flats[0], layout=layout, files=tuple(names))
    part = replace(MANIFEST, flats=(flat,), excluded=tuple(names))
    assert from_json(Manifest, json.loads(json.dumps(to_json(part)))) == part


@given(st.integers(1, 5), st.integers(1, 5))
def test_what_the_ranks_have_written_unites_to_the_whole(ranks: int, shards: int) -> None:
    """Each rank names its own files and shards alone, in any number; the order is that of the ranks."""
    files = tuple(FileRecord(f"f{rank}", rank, "crc32:00000000") for rank in range(ranks))
    holders = [f"f{shard % ranks}" for shard in range(shards)]
    flat = replace(MANIFEST.flats[0], layout=FlatShards(LAYOUT.tensors, shards, 4), files=tuple(holders))
    parts = [
        replace(
            MANIFEST,
            files=(file,),
            rank_files=(file.name,),
            module=MANIFEST.module if rank == 0 else (),
            flats=(replace(flat, files=tuple(h if h == file.name else "" for h in holders)),),
            excluded=("q",) if rank % 2 == 0 else (),
        )
        for rank, file in enumerate(files)
    ]
    names = tuple(file.name for file in files)
    assert united(parts) == replace(MANIFEST, files=files, rank_files=names, flats=(flat,))
    lost = replace(parts[0], flats=(replace(flat, files=("", *holders[1:])),))
    with pytest.raises(CheckpointError, match="no rank has written shard 0 of x"):
        united([lost])


@pytest.mark.parametrize("key", sorted(TEXT.keys() - {"format", "checksum"}))
def test_a_field_that_is_missing_is_damage(key: str) -> None:
    """With a checksum that fits: a program that rewrites manifests has left it out."""
    text = json.dumps({name: value for name, value in TEXT.items() if name != key}, indent=1)
    text = text.replace(_own(str(TEXT["checksum"])), _own(_BLANK))
    text = text.replace(_own(_BLANK), _own(checksum_text(zlib.crc32(text.encode()))))
    with pytest.raises(CheckpointError, match=rf"zeropipe_manifest.json is damaged: '{key}'"):
        Manifest.from_text(text, Path("folder/zeropipe_manifest.json"))


def test_a_change_of_one_character_is_damage() -> None:
    text = MANIFEST.to_text().replace('"checksum": "crc32:0', '"checksum": "crc32:1', 1)
    with pytest.raises(CheckpointError, match="its checksum does not match"):
        Manifest.from_text(text, Path("folder/zeropipe_manifest.json"))
