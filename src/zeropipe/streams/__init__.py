"""Streams, events and pinned memory of a device: ``owner.py`` says who works beside whom, and what orders them."""

from zeropipe.streams.driver import Driver, Moment
from zeropipe.streams.owner import STREAMS, Inline, Side, Streams
from zeropipe.streams.ring import Tell

__all__ = ["STREAMS", "Driver", "Inline", "Moment", "Side", "Streams", "Tell"]
