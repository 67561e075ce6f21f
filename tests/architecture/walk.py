"""The way from ``initialize(model=)`` to the engine, as somebody goes who reads the code: counted on a run.

A *stop* is a run of functions in one file, in the order in which they are first called. Who reads ``initialize`` reads
what it calls and what that calls, to see which steps there are; how a step is done inside stands on another page. So
calls two deep count, each function once; one-line forwards do not, as for the width of a class. A *return* is a stop
in a file that was left before. The tree before the house was rebuilt had 33 stops in 19 files, so 14 returns; by hand,
with properties, 37 in 20.

``python -m tests.architecture.walk`` prints the way.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from types import FrameType
from typing import Any, NamedTuple

from tests.architecture.rules import ROOT, SOURCE, source_files
from tests.architecture.structure import is_forward

DEPTH = 2  # of calls below initialize


class Stop(NamedTuple):
    path: str
    functions: list[str]


def returns(stops: list[Stop]) -> int:
    return len(stops) - len({stop.path for stop in stops})


def walk(stage: int = 0) -> list[Stop]:
    """The way in a run of one rank, taken in a process of its own."""
    command = [sys.executable, "-m", "tests.architecture.walk", str(stage), "json"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600)
    return [Stop(*stop) for stop in json.loads(found.stdout.splitlines()[-1])]


def _walk_here(stage: int) -> list[Stop]:
    import torch

    from zeropipe import initialize

    forwards = {
        (file.path, node.name, line)
        for file in source_files()
        for node in ast.walk(file.tree)
        if isinstance(node, ast.FunctionDef) and is_forward(node)
        # A function's first line is that of its decorators.
        for line in (node.lineno, *(one.lineno for one in node.decorator_list))
    }
    stops: list[Stop] = []
    seen: set[tuple[str, str, int]] = set()
    depth = 0

    def see(frame: FrameType, event: str, _: object) -> None:
        nonlocal depth
        code = frame.f_code
        if not code.co_filename.startswith(f"{SOURCE}{os.sep}"):
            return
        if event == "return":
            depth -= 1
        elif event == "call":
            depth += 1
            path = os.path.relpath(code.co_filename, SOURCE)
            at = path, code.co_name, code.co_firstlineno
            if depth > DEPTH + 1 or code.co_name.startswith("<") or at in forwards or at in seen:
                return
            seen.add(at)
            if not stops or stops[-1].path != path:
                stops.append(Stop(path, []))
            stops[-1].functions.append(code.co_name)

    config: dict[str, Any] = {
        "train_batch_size": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage},
    }
    initialize(model=torch.nn.Linear(2, 2), config=config)  # once, so that imports are no part of the way
    sys.setprofile(see)
    initialize(model=torch.nn.Linear(2, 2), config=config)
    sys.setprofile(None)
    # The way ends where the engine is made of its parts.
    end = next(at for at, stop in enumerate(stops) if stop.path == "runtime/engine/engine.py")
    return [*stops[:end], Stop(stops[end].path, ["__init__"])]


if __name__ == "__main__":
    way = _walk_here(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    if sys.argv[2:]:
        print(json.dumps(way))
    else:
        for stop in way:
            print(f"{stop.path:36} {', '.join(stop.functions)}")
        print(f"{len(way)} stops, {returns(way)} returns")
