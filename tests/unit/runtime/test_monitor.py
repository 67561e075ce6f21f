"""Scalars land in the files that users know, and a missing package says which extra brings it."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from zeropipe.config.parse import parse_config
from zeropipe.errors import ConfigError
from zeropipe.runtime.monitor import MonitorMaster


def config(**sections):
    return parse_config({"train_batch_size": 1, **sections})


def csv_config(folder):
    return config(csv_monitor={"enabled": True, "output_path": str(folder), "job_name": "job"})


def test_csv_files(tmp_path):
    monitor = MonitorMaster(csv_config(tmp_path))
    assert monitor.enabled
    monitor.write_events([("Train/Samples/lr", 0.5, 1), ("Train/Samples/train loss", torch.tensor(2.0), 1)])
    monitor.write_events([("Train/Samples/lr", 0.25, 2)])
    lr = tmp_path / "job" / "Train_Samples_lr.csv"
    assert lr.read_text().splitlines() == ["step,lr", "1,0.5", "2,0.25"]  # before close: a kill loses nothing
    monitor.close()
    assert (tmp_path / "job" / "Train_Samples_train_loss.csv").read_text().splitlines()[1] == "1,2.0"
    resumed = MonitorMaster(csv_config(tmp_path))
    resumed.write_events([("Train/Samples/lr", 0.125, 3)])
    resumed.close()
    resumed.close()
    resumed.write_events([("Train/Samples/lr", 9.0, 4)])
    assert lr.read_text().splitlines() == ["step,lr", "1,0.5", "2,0.25", "3,0.125"]


def test_other_ranks_touch_nothing(tmp_path):
    monitor = MonitorMaster(csv_config(tmp_path), enabled=False)
    monitor.write_events([("a", 1.0, 1)])
    monitor.flush()
    assert not monitor.enabled and list(tmp_path.iterdir()) == []
    assert not MonitorMaster(config()).enabled


@pytest.mark.parametrize("extra", ["tensorboard", "wandb"])
def test_missing_package_names_the_extra(monkeypatch, extra):
    module = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[extra]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"pip install 'zeropipe\[{extra}\]'"):
        MonitorMaster(config(**{extra: {"enabled": True}}))


def fake(monkeypatch, name, **members):
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def test_tensorboard_calls(monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, folder):
            calls.append(folder)

        def add_scalar(self, *args):
            calls.append(args)

        def flush(self):
            calls.append("flush")

        def close(self):
            calls.append("close")

    fake(monkeypatch, "torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    monitor = MonitorMaster(config(tensorboard={"enabled": True, "output_path": "out", "job_name": "j"}))
    monitor.write_events([("loss", 1, 3)])
    monitor.flush()
    monitor.close()
    assert calls == ["out/j", ("loss", 1.0, 3), "flush", "close"]


def test_wandb_calls(monkeypatch):
    calls = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append("end")
    )
    fake(monkeypatch, "wandb", init=lambda **kw: calls.append(kw) or run)
    monitor = MonitorMaster(config(wandb={"enabled": True, "project": "p", "team": "t"}))
    monitor.write_events([("a", 1, 3), ("b", 2, 3), ("a", 4, 4)])
    monitor.close()
    assert calls == [
        {"project": "p", "group": None, "entity": "t"},
        ({"a": 1.0, "b": 2.0}, 3),
        ({"a": 4.0}, 4),
        "end",
    ]
