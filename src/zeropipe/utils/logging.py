"""The one logger of zeropipe, without handlers or a level of its own, so that the application decides."""

import logging
from collections.abc import Sequence

logger: logging.Logger = logging.getLogger("zeropipe")


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Log ``message`` on the ranks that ``ranks`` names; None, empty or -1 among them: on all."""
    from zeropipe.comm.group import world

    rank = world().rank
    if not ranks or -1 in ranks or rank in ranks:
        logger.log(level, "[Rank %d] %s", rank, message)
