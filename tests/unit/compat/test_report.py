"""``ds_report`` says who answers ``import deepspeed``, and names what is there and what is not."""

from __future__ import annotations

import importlib.metadata
from types import ModuleType
from typing import Any

import pytest
import torch

import zeropipe
from zeropipe.compat import report
from zeropipe.compat.table import ABSENT, VERSION


def distribution(version: str) -> Any:
    return type("Found", (), {"version": version})


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        ([], "not installed"),
        (["0.19.8"], "0.19.8: the real package, not zeropipe"),
        (["0.19.8+zeropipe.0.0.1"], "0.19.8+zeropipe.0.0.1: an alias of another zeropipe"),
    ],
)
def test_who_answers(monkeypatch: pytest.MonkeyPatch, versions: list[str], says: str) -> None:
    monkeypatch.setattr(
        importlib.metadata, "distributions", lambda name: [distribution(version) for version in versions]
    )
    assert report.alias().startswith(says)


def test_the_alias_itself(deepspeed: ModuleType) -> None:
    assert report.alias() == f"{VERSION}: zeropipe {zeropipe.__version__}"


def test_a_broken_installation_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise zeropipe.errors.InstallationError("files of another")

    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: [distribution(VERSION)])
    monkeypatch.setattr(report, "install_as_deepspeed", broken)
    assert report.alias() == "broken: files of another"


def test_the_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    report.main()
    out = capsys.readouterr().out
    for fact in (torch.__version__, zeropipe.__version__, "gloo", "nothing", "torch's fused steps", *ABSENT):
        assert fact in out
    rows = dict(report.machine())
    assert (rows["GPUs"] == "none: computes on the CPU") == (not torch.cuda.is_available())
