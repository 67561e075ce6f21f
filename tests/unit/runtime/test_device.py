"""Which GPU is a rank's, and that it is the current one: NCCL takes the current device for what has no tensor."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from zeropipe.runtime.engine.placement import pick_device


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Four GPUs, of which the user has made number 3 the current one; what is made current then."""
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return found


@pytest.mark.parametrize(
    ("local_rank", "args", "wanted"),
    [
        ("2", None, 2),
        ("5", None, 1),  # more ranks than GPUs share them
        ("2", SimpleNamespace(local_rank=1), 1),
        ("2", SimpleNamespace(local_rank=-1), 2),
        ("2", SimpleNamespace(device_rank=0, local_rank=1), 0),
        (None, None, 3),  # started without torchrun, by somebody who has set the device
    ],
)
def test_the_device_is_set(monkeypatch, chosen: list[int], local_rank: str | None, args, wanted: int) -> None:
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert pick_device(args) == torch.device("cuda", wanted)
    assert chosen == [wanted]


def test_without_a_gpu_it_is_the_cpu() -> None:
    if not torch.cuda.is_available():
        assert pick_device() == torch.device("cpu")
