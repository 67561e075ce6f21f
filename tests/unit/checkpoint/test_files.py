"""Writing is synced and checksummed, reading never runs code, and every flipped byte is found and named."""

from __future__ import annotations

import os
import pickle
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeropipe.checkpoint.save.files import (
    FileRecord,
    FragmentAddress,
    LossScalerValues,
    check_file,
    load_torch,
    replace_text,
    write_torch,
)
from zeropipe.checkpoint.save.plain import is_plain
from zeropipe.checkpoint.utils import HostBuffers, snapshot
from zeropipe.errors import CheckpointError


class Evil:
    """Unpickling this runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    tree = {"a": torch.arange(5.0), "b": [1, "x", None, (2.5, True)], "c": torch.zeros(0, 3)}
    record = write_torch(tmp_path / "f.pt", tree)
    assert record.bytes == (tmp_path / "f.pt").stat().st_size
    check_file(tmp_path, record)
    back = load_torch(tmp_path / "f.pt")
    assert torch.equal(back["a"], tree["a"]) and back["b"] == tree["b"] and back["c"].shape == (0, 3)


def test_a_flipped_byte_is_found_wherever_it_is(tmp_path: Path) -> None:
    record = write_torch(tmp_path / "f.pt", {"a": torch.arange(3.0)})
    whole = (tmp_path / "f.pt").read_bytes()
    for at in range(0, len(whole), 7):
        (tmp_path / "f.pt").write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=r"f\.pt is damaged"):
            check_file(tmp_path, record)


@pytest.mark.parametrize("change", ["truncated", "longer", "missing"])
def test_a_file_of_another_size_is_named(tmp_path: Path, change: str) -> None:
    record = write_torch(tmp_path / "f.pt", {"a": torch.arange(3.0)})
    path = tmp_path / "f.pt"
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-7] if change == "truncated" else path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match=r"f\.pt"):
        check_file(tmp_path, record)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_code_in_a_file_is_not_run(tmp_path: Path, form: str) -> None:
    mark = tmp_path / "ran"
    path = tmp_path / "evil.pt"
    if form == "torch":
        torch.save({"module": Evil(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(CheckpointError, match=r"evil\.pt was not opened.*trust=True"):
        load_torch(path)
    assert not mark.exists()
    if form == "torch":
        load_torch(path, trust=True)  # the explicit opt-in does what it says
        assert mark.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"hello"])
def test_foreign_files_are_an_error_that_names_them(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"f\.pt"):
        load_torch(tmp_path / "f.pt")


def test_names_of_the_peer_are_written_without_importing_it(tmp_path: Path) -> None:
    scaler = LossScalerValues()
    scaler.__setstate__({"cur_scale": 8.0, "dynamic": True})
    write_torch(tmp_path / "f.pt", {"at": FragmentAddress(4, 2), "scaler": scaler})
    data = (tmp_path / "f.pt").read_bytes()
    assert b"deepspeed.utils.tensor_fragment" in data and b"zeropipe" not in data
    back = load_torch(tmp_path / "f.pt")
    assert (back["at"].numel, back["at"].start) == (4, 2)
    assert back["scaler"].values() == {"cur_scale": 8.0, "dynamic": True}


def test_replace_text_leaves_old_or_new(tmp_path: Path) -> None:
    replace_text(tmp_path / "latest", "one")
    replace_text(tmp_path / "latest", "two")
    assert (tmp_path / "latest").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    record = write_torch(tmp_path / "f.pt", {})
    with pytest.raises(CheckpointError, match="cannot be read"):
        check_file(tmp_path / "gone", record)
    (tmp_path / "f.pt").chmod(0)
    if not os.access(tmp_path / "f.pt", os.R_OK):  # root reads everything
        with pytest.raises(CheckpointError, match=r"f\.pt cannot be read"):
            load_torch(tmp_path / "f.pt")
    (tmp_path / "f.pt").chmod(stat.S_IRUSR | stat.S_IWUSR)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (1, True), (None, True), ("x", True), ({"a": [1, (2.0, b"x")]}, True), (torch.ones(2), True),
        (torch.float32, True), (object(), False), ({"a": Evil(Path("x"))}, False), ([lambda: 1], False),
    ],
)  # fmt: skip
def test_what_counts_as_plain_is_what_loads_without_code(tmp_path: Path, value: object, plain: bool) -> None:
    assert is_plain(value) is plain
    if plain:
        torch.save(value, tmp_path / "f.pt")
        load_torch(tmp_path / "f.pt")


# Snapshots.


def saved_size(tree: object, tmp_path: Path) -> int:
    return write_torch(tmp_path / "size.pt", tree).bytes


@pytest.mark.parametrize("copy", [False, True])
def test_a_view_is_saved_without_its_buffer(tmp_path: Path, copy: bool) -> None:
    flat = torch.arange(100_000.0)
    tree = snapshot({"a": flat[50_000:50_010].view(2, 5)}, copy=copy)
    assert torch.equal(tree["a"], flat[50_000:50_010].view(2, 5))
    assert saved_size(tree, tmp_path) < 5_000


@pytest.mark.parametrize("copy", [False, True])
def test_views_of_one_buffer_share_it_and_tied_tensors_stay_tied(tmp_path: Path, copy: bool) -> None:
    flat = torch.arange(10_000.0)
    tree = {"a": flat[:5_000], "b": flat[5_000:], "whole": flat, "tied": flat[:5_000]}
    cut = snapshot(tree, copy=copy)
    assert saved_size(cut, tmp_path) < 45_000  # 40,000 bytes of values, once
    back = load_torch(tmp_path / "size.pt")
    assert back["a"].data_ptr() == back["tied"].data_ptr() == back["whole"].data_ptr()
    assert all(torch.equal(back[key], tree[key]) for key in tree)


def test_a_copy_shares_nothing_with_live_tensors() -> None:
    flat = torch.zeros(10)
    copied, alias = snapshot([flat[:4]], copy=True), snapshot([flat[:4]], copy=False)
    flat.fill_(1.0)
    assert copied[0].sum() == 0 and alias[0].sum() == 4


def test_far_apart_views_of_a_huge_buffer_are_not_joined(tmp_path: Path) -> None:
    flat = torch.arange(1_000_000.0)
    tree = snapshot({"first": flat[:3], "last": flat[-3:], "again": flat[:3]}, copy=False)
    assert saved_size(tree, tmp_path) < 5_000
    assert tree["first"].data_ptr() == tree["again"].data_ptr()
    assert torch.equal(tree["last"], flat[-3:])


def test_host_buffers_are_used_again() -> None:
    buffers = HostBuffers()
    first = snapshot([torch.arange(8.0)], copy=True, buffers=buffers)[0].data_ptr()
    buffers.give_back()
    second = snapshot([torch.arange(8.0) + 1], copy=True, buffers=buffers)
    assert second[0].data_ptr() == first and second[0][0] == 1


@given(st.data())
def test_any_tree_of_any_views_survives(data: st.DataObject) -> None:
    base = torch.arange(60.0)
    views = []
    for _ in range(data.draw(st.integers(1, 5))):
        rows, columns = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
        strides = (data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6)))
        views.append(base.as_strided((rows, columns), strides, data.draw(st.integers(0, 20))))
    for copy in (False, True):
        cut = snapshot({"x": views, "y": (views[0], 3)}, copy=copy)
        assert all(torch.equal(a, b) for a, b in zip(cut["x"], views, strict=True))
        assert torch.equal(cut["y"][0], views[0]) and cut["y"][1] == 3


def test_a_record_compares_by_value() -> None:
    assert FileRecord("a", 1, "crc32:0") == FileRecord("a", 1, "crc32:0")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("copy", [False, True])
def test_a_quantized_tensor_is_saved_with_its_scale(copy: bool) -> None:
    """Its bytes alone are not it: made anew as a view of its memory it ended in an assertion inside torch."""
    whole = torch.quantize_per_tensor(torch.tensor([0.5, 1.0]), 0.1, 3, torch.qint8)
    rows = torch.quantize_per_channel(
        torch.ones(2, 2), torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.qint8
    )
    kept = snapshot({"whole": whole, "rows": rows}, copy=copy)
    for value, right in ((kept["whole"], whole), (kept["rows"], rows)):
        assert value.qscheme() == right.qscheme() and torch.equal(value.dequantize(), right.dequantize())
        assert (value.data_ptr() == right.data_ptr()) is not copy
