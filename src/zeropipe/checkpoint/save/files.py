"""The file layer: everything written is synced and checksummed, nothing read is executed.

A checkpoint is a folder of files; a folder becomes visible by a rename, after all that it holds is on the disk.
A file that could not be written whole is removed, and the error is the disk's own.
"""

from __future__ import annotations

import fcntl
import io
import os
import pickle
import secrets
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, ClassVar

import torch

from zeropipe.errors import CheckpointError, describe
from zeropipe.given import Anything

# Bytes read at once when checking a file: they are still in the cache when they are summed.
_CHUNK = 1 << 20
THREADS = 4  # that read at once in one process; checksums and copies let each other run


# Stand-ins for the three classes that DeepSpeed's files name: read without running code, written without DeepSpeed.
# They carry the saved values and do nothing. Pickle refuses to name a class that it cannot import, so the pickler below
# writes the name itself, and DeepSpeed reads our files back.


class LossScalerValues:
    """``deepspeed.runtime.fp16.loss_scaler.LossScaler`` and ``DynamicLossScaler``: their fields, by name."""

    def __init__(self, *args: Any) -> None:
        if args:
            self.cur_scale = args[0]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def values(self) -> dict[str, Any]:
        return dict(self.__dict__)


class StageValue(int):
    """``deepspeed.runtime.zero.config.ZeroStageEnum``: an int."""


class FragmentAddress:
    """``deepspeed.utils.tensor_fragment.fragment_address``: where a shard holds a parameter, in elements."""

    def __init__(self, numel: int = 0, start: int = 0) -> None:
        self.numel = numel
        self.start = start


_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (LossScalerValues, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (LossScalerValues, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (StageValue, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
]


class _Unpickler(pickle.Unpickler):
    """For trusted files: any class, but DeepSpeed's names still become the stand-ins."""

    def find_class(self, module: str, name: str) -> Any:
        for entry in _STAND_INS:
            if isinstance(entry, tuple) and entry[1] == f"{module}.{name}":
                return entry[0]
        return super().find_class(module, name)


# The Python one: only it can be taught to write a name. Its methods are not in the type stubs.
_Python: Any = pickle._Pickler


class _Pickler(_Python):
    dispatch: ClassVar[dict[Any, Any]] = dict(_Python.dispatch)

    def save_fragment(self, address: FragmentAddress) -> None:
        self.write(pickle.GLOBAL + b"deepspeed.utils.tensor_fragment\nfragment_address\n")
        self.save((address.numel, address.start))
        self.write(pickle.REDUCE)

    def save_scaler(self, scaler: LossScalerValues) -> None:
        name = b"DynamicLossScaler" if scaler.values().get("dynamic") else b"LossScaler"
        self.write(pickle.GLOBAL + b"deepspeed.runtime.fp16.loss_scaler\n" + name + b"\n")
        self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        self.save(scaler.values())
        self.write(pickle.BUILD)

    dispatch[FragmentAddress] = save_fragment
    dispatch[LossScalerValues] = save_scaler


# As the module that ``torch.save`` and ``torch.load`` ask for their pickler.
_PICKLE: Any = SimpleNamespace(__name__=__name__, Pickler=_Pickler, Unpickler=_Unpickler, load=pickle.load)


# Written.


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file must be: its size in bytes and its checksum, ``crc32:`` and eight hex digits."""

    name: str
    bytes: int
    checksum: str


class Output:
    """A raw file that is written whole: it sums up what passes and remembers why the disk refused."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        # Summed as it passes: one pass over the data, none when reading it back.
        self.crc = 0
        self.bytes = 0
        # torch's writer loses the error that its file raises and complains of a position instead.
        self.refusal: OSError | None = None

    def write(self, data: Anything) -> int:
        view = memoryview(data).cast("B")
        self.crc = zlib.crc32(view, self.crc)
        done = 0
        try:
            # A raw write may stop early, at 2 GiB or when the disk is filling.
            while done < len(view):
                done += self._file.write(view[done:])
        except OSError as error:
            self.refusal = self.refusal or error
            raise
        self.bytes += done
        return done

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self._file.flush()


def checksum_text(crc: int) -> str:
    return f"crc32:{crc & 0xFFFFFFFF:08x}"


def write_torch(path: Path, obj: Anything) -> FileRecord:
    """``torch.save`` in a new file, synced to the disk."""
    return _write(path, lambda output: torch.save(obj, output, pickle_module=_PICKLE))


def pickled(value: Anything) -> bytes:
    """As it will stand in a file. Raises what pickle raises."""
    file = io.BytesIO()
    torch.save(value, file, pickle_module=_PICKLE)
    return file.getvalue()


def unpickled(data: bytes) -> Any:
    """The object of this process that ``pickled`` was given, anew."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False, pickle_module=_PICKLE)


def write_text(path: Path, text: str) -> FileRecord:
    return _write(path, lambda output: output.write(text.encode()))


def _write(path: Path, fill: Callable[[Any], object]) -> FileRecord:
    with new_file(path) as output:
        fill(output)
    return FileRecord(path.name, output.bytes, checksum_text(output.crc))


@contextmanager
def new_file(path: Path) -> Iterator[Output]:
    """A file that did not exist, on the disk when the block ends; gone where the block raises.

    Raises OSError, with the path, where the disk refused.
    """
    # Unbuffered: torch's writer hands over whole tensors, which Python's buffer would only copy.
    with open(path, "xb", buffering=0) as file:
        output = Output(file)
        try:
            yield output
            os.fsync(file.fileno())
        except BaseException as error:
            path.unlink(missing_ok=True)
            refusal = output.refusal or (error if isinstance(error, OSError) else None)
            if refusal is None or not isinstance(error, Exception):
                raise
            raise OSError(refusal.errno, refusal.strerror or str(refusal), str(path)) from error


def temporary(path: Path) -> Path:
    """A name for what will be ``path``, of nobody else: not of another run that saves into the same folder."""
    return path.with_name(f".{path.name}.zeropipe-{secrets.token_hex(6)}.incomplete")


def replace_text(path: Path, text: str) -> None:
    """Give ``path`` new contents at once: a reader sees the old or the new text, never a part."""
    new = temporary(path)
    write_text(new, text)
    try:
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def check_room(folder: Path, nbytes: int) -> None:
    """Raises CheckpointError where the file system of ``folder``, which need not be there yet, has no room for
    ``nbytes``, or this user's quota where the system counts it so."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), None)
    free = None
    with suppress(OSError):
        found = os.statvfs(there or "/")
        blocks = found.f_bfree if os.geteuid() == 0 else found.f_bavail
        free = blocks * found.f_frsize if found.f_blocks else None  # some do not say
    if free is not None and free < nbytes:
        raise CheckpointError(
            f"there is no room for a checkpoint in {folder}",
            expected=f"about {nbytes:,} bytes",
            found=f"{free:,} bytes free",
            fix="free space or save elsewhere; nothing was written, and earlier checkpoints are intact",
        )


def sync_folder(path: Path) -> None:
    """Make renames and new names inside ``path`` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_file(folder: Path, record: FileRecord) -> None:
    """Raises CheckpointError, naming the file, when it is not byte for byte what was written."""
    path = folder / record.name
    try:
        size = path.stat().st_size
        if size != record.bytes:
            raise CheckpointError(
                f"{path} is truncated or was written by something else",
                expected=f"{record.bytes} bytes",
                found=size,
                fix="use an earlier checkpoint, or copy this one again from where it is whole",
            )
        crc = 0
        # One buffer for all: fresh memory costs more than the checksum.
        buffer = memoryview(bytearray(_CHUNK))
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                crc = zlib.crc32(buffer[:count], crc)
    except OSError as error:
        raise CheckpointError(missing_text(path, error)) from error
    # Of the right size and readable, and still another file: a flipped bit, or a copy that was cut and filled up.
    if checksum_text(crc) != record.checksum:
        raise CheckpointError(
            f"{path} is damaged: its bytes are not those that were written",
            expected=record.checksum,
            found=checksum_text(crc),
            fix="use an earlier checkpoint, or copy this one again from where it is whole",
        )


def missing_text(path: Path, error: OSError) -> str:
    return describe(
        f"{path} cannot be read: {error.strerror or error}",
        fix="check that the whole checkpoint folder is visible from this machine",
    )


# torch's list of allowed classes belongs to the process: a thread that leaves the block takes them from the others.
_LOADING = threading.Lock()


def load_torch(path: Path, *, trust: bool = False) -> Any:
    """Open a ``torch.save`` file without running code from it; tensors stay on the disk until they are read.

    ``trust=True`` unpickles anything, so it runs code of whoever wrote the file. Raises CheckpointError for a
    file that is missing, damaged, or holds other objects than tensors, plain values and the few harmless
    classes that DeepSpeed's files name (which become stand-ins without behaviour).
    """
    try:
        if trust:
            return torch.load(
                path, map_location="cpu", mmap=_is_zip(path), weights_only=False, pickle_module=_PICKLE
            )
        with _LOADING, torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", mmap=_is_zip(path), weights_only=True)
    except OSError as error:
        raise CheckpointError(missing_text(path, error)) from error
    except pickle.UnpicklingError as error:
        lines = str(error).splitlines() or ["an unknown object"]
        raise CheckpointError(
            f"{path} was not opened: it holds something other than tensors and plain values, which could run code",
            expected="what zeropipe or DeepSpeed writes",
            found=next((line.strip() for line in lines if "GLOBAL" in line), lines[0]),
            fix="if you trust whoever wrote the file, say so with trust=True (`--trust` on the command line)",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} is not a file that torch.save wrote, or is damaged: {reason}",
            fix="use an earlier checkpoint; `zeropipe ckpt verify` lists what is whole",
        ) from error


def _is_zip(path: Path) -> bool:
    """Whether the file is in torch's zip format, the only one that can be mapped into memory."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


# Locks that end with their process, however that ends, say to other processes that somebody still writes. Those of the
# whole file (``flock``) are shared by writers and tried by who wants to clean up; they hold between machines on NFS
# too. Where a file system has none, nothing can be proved, and what stands there counts as being written.


class Hold:
    """Open for as long as its process writes; several processes may hold one file."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._handle, fcntl.LOCK_SH)

    def release(self) -> None:
        """May be called again."""
        if self._handle >= 0:
            # Named, not only closed: a data loader's worker that was forked meanwhile has the handle too.
            with suppress(OSError):
                fcntl.flock(self._handle, fcntl.LOCK_UN)
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def nobody_holds(path: Path) -> bool:
    """Whether that is proved."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        finally:
            os.close(handle)
    return False
