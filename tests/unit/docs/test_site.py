"""The site builds without a warning: every page is reached, every link between pages leads somewhere, every public
docstring is what the generator can read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.process
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(DOCS), str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "api.html").read_text("utf-8")
    for name in ("zeropipe.entry.initialize", "GatheredParameters", "PipelineModule", "OnebitAdam"):
        assert name in page
