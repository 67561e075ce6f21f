"""DeepSpeed as a peer: the package itself, and not zeropipe under its name, which the clients' environment has."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
from typing import Any


def deepspeed() -> Any:
    """The module. Raises SystemExit where this interpreter has none, or zeropipe under that name."""
    why_not = _why_not()
    if why_not:
        raise SystemExit(f"Error: {why_not}")
    return importlib.import_module("deepspeed")


def why_no_deepspeed(python: str) -> str:
    """Why the interpreter ``python`` cannot be the peer; empty if it can."""
    probe = "from benchmarks.common.peers import _why_not; print(_why_not())"
    found = subprocess.run([python, "-c", probe], capture_output=True, text=True)
    why_not = found.stdout.strip() if found.returncode == 0 else found.stderr.strip().splitlines()[-1]
    return f"{python}: {why_not}; name an interpreter with --peer-python" if why_not else ""


def _why_not() -> str:
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return "no deepspeed"
    return f"its deepspeed {version} is zeropipe itself" if "zeropipe" in version else ""
