"""The errors that zeropipe raises for its users, and the one way in which their messages are built.

Every message names what was wrong, where (key, parameter, rank), what was expected, what was found and
the way out, so that nobody has to read the source to go on.
"""

from __future__ import annotations


def describe(
    what: object,
    *,
    rank: int | None = None,
    expected: object = None,
    found: object = None,
    fix: str | None = None,
) -> str:
    """Lay out an error message: ``[rank R] what; expected E, found F. Fix: ...``.

    ``expected`` and ``found`` are left out when None.
    """
    parts = [str(what) if rank is None else f"[rank {rank}] {what}"]
    facts = [
        f"{word} {value}" for word, value in (("expected", expected), ("found", found)) if value is not None
    ]
    if facts:
        parts.append(", ".join(facts))
    text = "; ".join(parts)
    return f"{text}. Fix: {fix}" if fix else text


class ZeropipeError(Exception):
    """Base of every error that zeropipe raises on purpose.

    It takes what ``describe`` takes, and is its text: an error is unpickled from that alone.
    """

    def __init__(
        self,
        what: object = "",
        *,
        rank: int | None = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(describe(what, rank=rank, expected=expected, found=found, fix=fix))


class ConfigError(ZeropipeError, ValueError):
    """The configuration cannot be used; nothing was started."""


class DesyncError(ZeropipeError, RuntimeError):
    """Ranks disagree on what to do next (config, layout, parameter order or control flow)."""


class CommunicationError(ZeropipeError, RuntimeError):
    """A collective did not complete: a peer died, left or took another path."""


class UnavailableParameterError(ZeropipeError, RuntimeError):
    """A sharded parameter was used while this rank holds only its shard."""


class UnsupportedOptimizerError(ZeropipeError, TypeError):
    """The optimizer's update cannot be computed on shards, or not at this stage."""


class LossScaleError(ZeropipeError, RuntimeError):
    """The fp16 loss scale is at its minimum and gradients still overflow."""


class CheckpointError(ZeropipeError, RuntimeError):
    """A checkpoint cannot be written or read; what was there before is intact."""


class OffloadError(ZeropipeError, OSError):
    """Offloaded state has no room where it should live, or no folder."""


class ScheduleError(ZeropipeError, ValueError):
    """A pipeline schedule is malformed or would deadlock."""


class UsageError(ZeropipeError, RuntimeError):
    """A call that cannot work in this state; the message says which call to make instead."""


class InstallationError(ZeropipeError, ImportError):
    """Files of two packages of the same name are mixed; what is imported would be neither."""
