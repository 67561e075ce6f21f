"""The distribution ``deepspeed`` of compat/deepspeed: built, installed and imported; mixed with another, refused."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import zeropipe
from tests.helpers.launch import ROOT, python
from zeropipe.checkpoint.save.peer_keys import __file__ as peer_keys_file
from zeropipe.compat.finder import foreign_files
from zeropipe.compat.table import MODULES, NAMES, PEER_VERSION, VERSION
from zeropipe.errors import InstallationError, UsageError

SOURCE = ROOT / "compat" / "deepspeed"
FACTS = """
import importlib.metadata, importlib.util, json, sys
spec = importlib.util.find_spec("deepspeed")
import deepspeed
print(json.dumps({
    "spec": spec is not None and spec.origin,
    "again": importlib.util.find_spec("deepspeed") is not None,
    "version": importlib.metadata.version("deepspeed"),
    "name": importlib.metadata.metadata("deepspeed")["Name"],
    "attribute": deepspeed.__version__,
    "packages": importlib.metadata.packages_distributions().get("deepspeed"),
    "torch": "torch" in sys.modules,
}))
"""


@pytest.fixture(scope="module")
def backend() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shim_backend", SOURCE / "backend.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def site(backend: ModuleType, tmp_path: Path) -> Path:
    """A folder with the wheel's files, as pip leaves them."""
    folder = tmp_path / "site"
    folder.mkdir()
    with zipfile.ZipFile(tmp_path / backend.build_wheel(str(tmp_path))) as wheel:
        wheel.extractall(folder)
    return folder


def run(site: Path, code: str, *args: str) -> subprocess.CompletedProcess[str]:
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return python("-c", code, *args, env={"PYTHONPATH": os.pathsep.join(paths)}, cwd=site.parent)


def facts(site: Path) -> Mapping[str, Any]:
    done = run(site, FACTS)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found: Mapping[str, Any] = json.loads(done.stdout)
    return found


def test_the_version_is_the_interfaces_and_ours() -> None:
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]
    assert project["name"] == "deepspeed"
    assert project["version"] == VERSION == f"0.19.8+zeropipe.{zeropipe.__version__}"
    assert project["dependencies"] == [f"zeropipe=={zeropipe.__version__}"]
    assert f'"{PEER_VERSION}"' in Path(peer_keys_file).read_text()  # the version that our checkpoints name
    from packaging.version import Version

    assert Version(VERSION) >= Version("0.19.6") and Version("0.19.8") <= Version(VERSION) < Version("0.19.9")


def test_it_answers_every_way_in_which_clients_ask(site: Path) -> None:
    found = facts(site)
    assert found["version"] == found["attribute"] == VERSION
    assert found["name"] == "deepspeed" and found["packages"] == ["deepspeed"]
    assert found["spec"] == str(site / "deepspeed" / "__init__.py") and found["again"]
    assert found["torch"] is False  # the import itself is cheap


FRESH = """
import json, sys
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed import DeepSpeedEngine, zero
import deepspeed, zeropipe
assert ZeroParamStatus is zeropipe.zero.ZeroParamStatus and zero is zeropipe.zero
assert DeepSpeedEngine is zeropipe.DeepSpeedEngine
assert deepspeed is sys.modules["deepspeed"]
missing = []
for path in json.loads(sys.argv[1]):
    owner = deepspeed
    for part in path.split("."):
        owner = getattr(owner, part, None)
    if owner is None:
        missing.append(path)
assert not missing, missing
import deepspeed.inference
try:
    deepspeed.inference.engine()
except AttributeError as error:
    print(error)
"""


@pytest.mark.process
def test_in_a_fresh_process_imports_and_attributes_lead_to_zeropipes_objects(site: Path) -> None:
    # Modules that zeropipe has under the same name are reached without an import; other names are for imports.
    paths = [path for path, ours in MODULES.items() if ours.endswith(f".{path}") or path == "zero"]
    assert len(paths) > 30
    done = run(site, FRESH, json.dumps([*paths, *filter(None, NAMES)]))
    assert done.stdout.startswith("deepspeed.inference.engine is not part of zeropipe"), done.stderr


def test_the_package_holds_no_logic() -> None:
    (file,) = (SOURCE / "src").rglob("*.py")
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith(('"""', "#"))]
    assert lines == [
        "from zeropipe.compat import install_as_deepspeed",
        "__zeropipe_shim__ = True",
        "install_as_deepspeed()",
    ]


def test_the_wheels_record_is_true(site: Path) -> None:
    info = site / f"deepspeed-{VERSION}.dist-info"
    listed = {}
    for line in (info / "RECORD").read_text().splitlines():
        name, digest, size = line.split(",")
        listed[name] = (digest, size)
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert listed.keys() == files
    for name in files - {f"{info.name}/RECORD"}:
        data = (site / name).read_bytes()
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        assert listed[name] == (f"sha256={digest}", str(len(data)))
    points = (info / "entry_points.txt").read_text()
    assert "deepspeed = zeropipe.compat.runner:main" in points and "ds_report = " in points


@pytest.mark.process
def test_pip_installs_it_without_a_network(tmp_path: Path) -> None:
    done = python(
        *[
            "-m",
            "pip",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--no-cache-dir",
            "--disable-pip-version-check",
        ],
        "--target",
        tmp_path / "site",
        SOURCE,
    )
    assert done.returncode == 0, done.stderr
    assert facts(tmp_path / "site")["version"] == VERSION
    scripts = {path.name for path in (tmp_path / "site" / "bin").iterdir()}
    assert scripts == {"deepspeed", "ds_report"}
    assert not [
        path for path in SOURCE.rglob("*") if path.suffix in (".whl", ".egg-info") or path.name == "build"
    ]


def test_the_source_archive_builds_the_same_wheel(backend: ModuleType, tmp_path: Path) -> None:
    import tarfile

    name = backend.build_sdist(str(tmp_path))
    with tarfile.open(tmp_path / name) as archive:
        archive.extractall(tmp_path, filter="data")
    first = (tmp_path / backend.build_wheel(str(tmp_path))).read_bytes()
    unpacked = tmp_path / name.removesuffix(".tar.gz")
    again = tmp_path / "again"
    again.mkdir()
    done = python("-c", "import sys, backend; backend.build_wheel(sys.argv[1])", again, cwd=unpacked)
    assert done.returncode == 0, done.stderr
    assert next(again.iterdir()).read_bytes() == first


def test_leftover_files_of_the_real_package_are_an_error(site: Path) -> None:
    (site / "deepspeed" / "ops").mkdir()
    (site / "deepspeed" / "ops" / "native.so").write_bytes(b"")
    done = run(site, "import deepspeed")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "InstallationError" in last and str(site / "deepspeed") in last
    assert "found ops. Fix: run pip uninstall deepspeed" in last
    assert issubclass(InstallationError, ImportError)


def test_what_python_itself_leaves_is_no_leftover(site: Path) -> None:
    folder = site / "deepspeed"
    cache = folder / "comm" / "__pycache__"
    cache.mkdir(parents=True)
    (cache / "old.cpython-311.pyc").write_bytes(b"")
    (folder / "empty").mkdir()
    assert foreign_files(folder) == []
    assert facts(site)["version"] == VERSION
    (folder / "version.txt").write_text("0.19.8")
    assert foreign_files(folder) == ["version.txt"]


def real_metadata(folder: Path) -> None:
    info = folder / "deepspeed-0.19.8.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.19.8\n")


def test_metadata_of_the_real_package_beside_it_is_an_error(site: Path) -> None:
    real_metadata(site)
    done = run(site, "import deepspeed")
    assert "metadata is another distribution's; found version 0.19.8. Fix: run pip uninstall" in done.stderr


def test_a_real_package_that_is_shadowed_as_a_whole_does_no_harm(site: Path, tmp_path: Path) -> None:
    below = tmp_path / "below"
    real_metadata(below)
    code = f"import sys; sys.path.append({str(below)!r})\n{FACTS}"
    assert json.loads(run(site, code).stdout)["version"] == VERSION
    code = f"import sys; sys.path.insert(0, {str(below)!r})\nimport deepspeed"
    assert "metadata is another distribution's" in run(site, code).stderr


def test_in_one_process_without_the_distribution(deepspeed: ModuleType) -> None:
    from importlib import metadata

    from zeropipe.compat import install_as_deepspeed

    assert install_as_deepspeed() is deepspeed is sys.modules["deepspeed"]
    assert sum(type(finder).__name__ == "AliasFinder" for finder in sys.meta_path) == 1
    assert importlib.util.find_spec("deepspeed") is not None
    assert metadata.version("deepspeed") == VERSION == deepspeed.__version__
    assert metadata.metadata("deepspeed")["Name"] == "deepspeed"
    assert metadata.packages_distributions()["deepspeed"] == ["deepspeed"]


def test_it_does_not_replace_a_real_one_that_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    from zeropipe.compat import install_as_deepspeed

    real = ModuleType("deepspeed")
    real.__file__ = "/site/deepspeed/__init__.py"
    monkeypatch.setitem(sys.modules, "deepspeed", real)
    before = list(sys.meta_path)
    with pytest.raises(UsageError, match=r"real deepspeed is imported already; found /site.*Fix: call"):
        install_as_deepspeed()
    assert sys.meta_path == before and sys.modules["deepspeed"] is real
