"""Pipeline parallelism: plan a schedule, simulate it, execute it. The public names come on demand."""

from zeropipe.names import homes, lazy

__all__ = list(homes(__name__))

__getattr__, __dir__ = lazy(__name__)
