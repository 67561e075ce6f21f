"""Lets ranks check that they are about to do the same thing, before a difference can hang them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping

from zeropipe.comm.collectives import all_gather_object
from zeropipe.comm.group import Group
from zeropipe.errors import DesyncError


def agree(items: Mapping[str, str], group: Group) -> None:
    """Return when ``items`` are equal on every member; one small collective, two when they differ.

    Raises DesyncError, on every member alike, that names the odd ranks and the first item that differs.
    """
    if group.size == 1:
        return
    text = json.dumps(list(items.items()))
    digests = all_gather_object(hashlib.sha256(text.encode()).hexdigest(), group, label="agree")
    if len(set(digests)) == 1:
        return
    everyone: list[dict[str, str]] = all_gather_object(dict(items), group, label="agree")
    raise DesyncError(first_difference(everyone, group.ranks))


def first_difference(everyone: list[dict[str, str]], ranks: tuple[int, ...]) -> str:
    """What the members disagree on first: pure, given every member's items."""
    keys = list(dict.fromkeys(key for items in everyone for key in items))
    for key in keys:
        values = [items.get(key, "(absent)") for items in everyone]
        if len(set(values)) == 1:
            continue
        usual, count = Counter(values).most_common(1)[0]
        odd = [(rank, value) for rank, value in zip(ranks, values, strict=True) if value != usual]
        names = ", ".join(f"rank {rank} has {_short(value)}" for rank, value in odd)
        agreed = f"{count} of {len(values)} ranks have {_short(usual)}"
        return f"ranks disagree on {key}: {names}; {agreed}. Fix: give every rank the same model and config"
    return "ranks disagree on the order of their items. Fix: build the model in the same order on every rank"


def _short(value: str, limit: int = 200) -> str:
    return repr(value if len(value) <= limit else value[:limit] + "...")
