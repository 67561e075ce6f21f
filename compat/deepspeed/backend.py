"""Builds this package's wheel: one file and its metadata, so that installing it needs no build tool and no network.

The hooks are those of PEP 517, the wheel's form is that of PEP 427.
"""

from __future__ import annotations

import base64
import hashlib
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FIXED_TIME = (2020, 1, 1, 0, 0, 0)  # the same input gives the same wheel


def _project() -> dict[str, Any]:
    with open(HERE / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["project"]


def _metadata(project: dict[str, Any]) -> str:
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {project['name']}",
        f"Version: {project['version']}",
        f"Summary: {project['description']}",
        f"License-Expression: {project['license']}",
        f"Requires-Python: {project['requires-python']}",
        *(f"Requires-Dist: {requirement}" for requirement in project["dependencies"]),
        "Description-Content-Type: text/markdown",
    ]
    return "\n".join(lines) + "\n\n" + (HERE / project["readme"]).read_text(encoding="utf-8")


def _entry_points(project: dict[str, Any]) -> str:
    lines = [f"{name} = {target}" for name, target in project.get("scripts", {}).items()]
    return "\n".join(["[console_scripts]", *lines, ""])


def build_wheel(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    """Write the wheel into ``wheel_directory``; returns its file name."""
    project = _project()
    stem = f"{project['name']}-{project['version']}"
    info = f"{stem}.dist-info"
    files = {
        path.relative_to(HERE / "src").as_posix(): path.read_bytes()
        for path in sorted((HERE / "src").rglob("*.py"))
    }
    files[f"{info}/METADATA"] = _metadata(project).encode()
    files[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: zeropipe\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    files[f"{info}/entry_points.txt"] = _entry_points(project).encode()
    files[f"{info}/top_level.txt"] = f"{project['name']}\n".encode()
    record = []
    for path, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.append(f"{path},sha256={digest},{len(data)}")
    record.append(f"{info}/RECORD,,")
    files[f"{info}/RECORD"] = ("\n".join(record) + "\n").encode()
    name = f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory) / name, "w") as wheel:
        for path, data in files.items():
            entry = zipfile.ZipInfo(path, FIXED_TIME)
            entry.external_attr = 0o644 << 16
            wheel.writestr(entry, data)
    return name


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    """Write the source archive into ``sdist_directory``; returns its file name."""
    project = _project()
    stem = f"{project['name']}-{project['version']}"
    with tarfile.open(Path(sdist_directory) / f"{stem}.tar.gz", "w:gz") as archive:
        for path in ("pyproject.toml", "backend.py", project["readme"], "src/deepspeed/__init__.py"):
            archive.add(HERE / path, f"{stem}/{path}")
    return f"{stem}.tar.gz"
