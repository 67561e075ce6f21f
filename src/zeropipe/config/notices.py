"""What parsing has to say besides errors, as data, so that parsing stays pure and rank 0 logs it once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class NoticeKind(Enum):
    """Why a notice exists; the value is the ``logging`` level at which the engine shows it."""

    FOREIGN = logging.WARNING  # could be the misspelling that we did not recognise, so it is shown
    NO_EFFECT = logging.INFO  # on purpose below the default level: nothing is wrong
    RENAMED = logging.DEBUG  # the old name does what it always did


@dataclass(frozen=True, slots=True)
class Notice:
    """One line for the user, about ``keys``."""

    kind: NoticeKind
    keys: tuple[str, ...]
    text: str

    @property
    def level(self) -> int:
        return self.kind.value


def foreign(keys: Sequence[str]) -> Notice:
    """Top-level keys that zeropipe does not know; other software keeps its own settings there."""
    text = f"configuration: passed over {len(keys)} key(s) that zeropipe does not know: {', '.join(keys)}"
    dotted = [name for name in keys if "." in name]
    if dotted:
        text += f" (a dotted name is not read as a path: write {dotted[0].replace('.', ' -> ')} as nested objects)"
    return Notice(NoticeKind.FOREIGN, tuple(keys), text)


def no_effect(reasons: dict[str, str]) -> Notice:
    """Keys that are known and change nothing here, each with what happens instead."""
    listed = "; ".join(f"{name} ({why})" for name, why in reasons.items())
    return Notice(
        NoticeKind.NO_EFFECT, tuple(reasons), f"configuration: these keys have no effect here: {listed}"
    )


def renamed(names: dict[str, str]) -> Notice:
    """Old names that were read as their new ones."""
    listed = ", ".join(f"{old} -> {new}" for old, new in names.items())
    return Notice(NoticeKind.RENAMED, tuple(names), f"configuration: old names read as new ones: {listed}")
