"""Which bytes of which file are which tensor; a file that is not what it says is named, with what was expected."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zeropipe.errors import CheckpointError, UsageError
from zeropipe.tensor.weight_files import DTYPES, Reader, open_weights

STATE = {"a": torch.arange(12.0).view(3, 4), "b": torch.tensor(3), "c": torch.ones(0, 2)}


def read(path: Path, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    with Reader() as reader:
        found = {}
        for key, stored in open_weights(path).items():
            out = torch.empty(torch.Size(stored.shape).numel(), dtype=dtype or stored.dtype)
            reader.fill(stored.mosaic, 0, out)
            found[key] = out.view(stored.shape)
        return found


def header(folder: Path, **entry: object) -> Path:
    """A file whose header says of one tensor of 4 floats what ``entry`` says."""
    said = {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | entry}
    text = json.dumps(said).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    return path


@pytest.mark.parametrize("dtype", sorted(set(DTYPES.values()), key=str), ids=str)
def test_every_dtype_of_safetensors_is_read_to_the_bit(tmp_path, dtype):
    value = torch.randint(0, 2, (5, 3)).to(dtype)
    save_file({"x": value}, tmp_path / "model.safetensors")
    assert torch.equal(read(tmp_path)["x"].view(torch.uint8), value.view(torch.uint8))


def test_both_kinds_of_file_have_the_same_tensors(tmp_path):
    save_file(STATE, tmp_path / "x.safetensors")
    torch.save(STATE | {"a": STATE["a"].t().contiguous().t()}, tmp_path / "x.bin")
    for name in ("x.safetensors", "x.bin"):
        found = read(tmp_path / name)
        assert found.keys() == STATE.keys()
        assert all(torch.equal(found[key], STATE[key]) for key in STATE)


def test_a_cast_is_torchs_own_in_pieces(tmp_path):
    value = torch.randn(3_000_000)  # more than the buffer between file and memory
    save_file({"x": value}, tmp_path / "model.safetensors")
    assert torch.equal(read(tmp_path, torch.bfloat16)["x"], value.bfloat16())
    with Reader() as reader:
        stored = open_weights(tmp_path)["x"].cast(torch.float16).cast(torch.float64)
        out = torch.empty(7, dtype=torch.float32)
        reader.fill(stored.mosaic, 2_999_990, out)
        assert torch.equal(out, value[2_999_990:2_999_997].half().float())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda at: header(at, dtype="F4"), "expected a dtype that torch has: .*, found F4"),
        (lambda at: header(at, shape=[5]), r"expected 20 bytes for F32 \[5\], found 16"),
        (lambda at: header(at, data_offsets=[0, 32], shape=[8]), "is cut before the end of 'x'"),
        (lambda at: header(at, shape=None), "the header of .* cannot be read"),
        (lambda at: (at / "pytorch_model.bin").write_bytes(b"x"), "cannot be read by torch.load"),
        (
            lambda at: torch.save([1, 2], at / "pytorch_model.bin"),
            "a state dict: tensors by name, found list",
        ),
        (
            lambda at: torch.save(STATE, at / "pytorch_model.bin", _use_new_zipfile_serialization=False),
            "format that torch had before 1.6",
        ),
        (lambda at: (at / "model.safetensors.index.json").write_text("{}"), "is no index .KeyError"),
    ],
)
def test_a_file_that_is_not_what_it_says(tmp_path, make: Callable[[Path], object], says: str):
    make(tmp_path)
    with pytest.raises(CheckpointError, match=says):
        open_weights(tmp_path)


def test_no_file_at_all(tmp_path):
    with pytest.raises(UsageError, match="a file or a folder, found nothing there"):
        open_weights(tmp_path / "absent.safetensors")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UsageError, match=r"no weights in the folder .* found notes.txt"):
        open_weights(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(64)}, path)
    stored = open_weights(path)["x"]
    os.truncate(path, path.stat().st_size - 8)
    with (
        Reader() as reader,
        pytest.raises(CheckpointError, match="has become shorter while it was read, at 'x'"),
    ):
        reader.fill(stored.mosaic, 0, torch.empty(64))
