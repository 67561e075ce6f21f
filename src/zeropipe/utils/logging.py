"""The one logger of zeropipe, without handlers or a level of its own, so that the application decides."""

import logging

logger: logging.Logger = logging.getLogger("zeropipe")
