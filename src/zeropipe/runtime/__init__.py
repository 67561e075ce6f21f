"""Training: the engines, and the four subjects that they wire together."""

from zeropipe.names import lazy

__getattr__, __dir__ = lazy(__name__)
