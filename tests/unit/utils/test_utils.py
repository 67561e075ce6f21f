"""The logger is one plain logger that says nothing by itself, and names are loaded on demand."""

from __future__ import annotations

import logging

import pytest

import zeropipe.utils
from zeropipe.utils.logging import logger


def test_one_logger_without_handlers():
    assert zeropipe.utils.logger is logger is logging.getLogger("zeropipe")
    assert logger.handlers == [] and logger.level == logging.NOTSET and logger.propagate


def test_names_on_demand():
    assert zeropipe.utils.RepeatingLoader.__module__ == "zeropipe.runtime.dataloader"
    assert "RepeatingLoader" in dir(zeropipe.utils)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = zeropipe.utils.nothing
