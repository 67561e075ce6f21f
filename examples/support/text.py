"""Text as bytes: a folder or a file, cut once into what is trained on and what is held out.

Four spaces of indentation become one tab, as which code is shorter and easier to learn, and which `shown` turns
back. Bits per byte are those of the text in this form.

Which bytes a rank sees is a pure function of (step, micro-batch, rank). Nothing has to be remembered, so a run
that was stopped and goes on sees exactly what a run that never stopped would have seen.
"""

import hashlib
import re
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

INDENT = 4  # spaces
HELD_OUT = 20  # one file, or one byte, in so many
STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
# Tests, tables and third-party packages: not prose that anyone would want to imitate.
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "encodings"}


@dataclass(frozen=True)
class Text:
    train: Tensor  # 1D, uint8
    held_out: Tensor  # 1D, uint8
    source: str
    digest: str

    def batch(self, step: int, micro: int, rank: int, rows: int, context: int) -> tuple[Tensor, Tensor]:
        """Inputs and next bytes, each int64 [rows, context], for one micro-batch of one rank."""
        generator = torch.Generator().manual_seed(hash((step, micro, rank)) % 2**63)
        starts = torch.randint(len(self.train) - context, (rows,), generator=generator)
        return _windows(self.train, starts, context)

    def held_out_batch(self, part: int, parts: int, rows: int, context: int) -> tuple[Tensor, Tensor]:
        """Part `part` of `parts` of the same held-out windows, evenly spread, at every call."""
        starts = torch.linspace(0, len(self.held_out) - context - 1, rows * parts).long()
        return _windows(self.held_out, starts[part::parts], context)


def read_text(source: Path | None, context: int) -> Text:
    """Read `source` (None: the Python standard library); a text that is too short ends the program."""
    suffix = ".py" if source is None else ""
    root = source or STANDARD_LIBRARY
    if not root.exists():
        sys.exit(f"--text {root}: there is no such file or folder.")
    files = [root] if root.is_file() else sorted(p for p in root.rglob(f"*{suffix}") if _wanted(p, root))
    documents = [_with_tabs(data) for data in (path.read_bytes() for path in files) if b"\0" not in data]
    if len(documents) >= HELD_OUT:
        held_out = b"".join(documents[HELD_OUT // 2 :: HELD_OUT])
        train = b"".join(d for i, d in enumerate(documents) if i % HELD_OUT != HELD_OUT // 2)
    else:
        whole = b"".join(documents)
        cut = len(whole) - len(whole) // HELD_OUT
        train, held_out = whole[:cut], whole[cut:]
    if len(held_out) <= context + 1:
        sys.exit(
            f"--text {root}: {len(train) + len(held_out):,} bytes of text in {len(documents)} files are too few; "
            f"at least {HELD_OUT * (context + 2):,} are needed. Give a longer file or a folder with more of them."
        )
    digest = hashlib.sha256(train + held_out).hexdigest()[:16]
    return Text(_bytes(train), _bytes(held_out), str(root), digest)


def shown(text: bytes) -> str:
    """What the model wrote, for people."""
    return text.decode("utf-8", errors="replace").expandtabs(INDENT)


def _with_tabs(data: bytes) -> bytes:
    return re.sub(rb"(?m)^(?: {4})+", lambda spaces: b"\t" * (len(spaces[0]) // INDENT), data)


def _wanted(path: Path, root: Path) -> bool:
    folders = path.relative_to(root).parts[:-1]
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.is_file() and not hidden and not LEFT_OUT.intersection(folders)


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _windows(data: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    rows = data[starts[:, None] + torch.arange(context + 1)].long()
    return rows[:, :-1], rows[:, 1:]
