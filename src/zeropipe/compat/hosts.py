"""Which slots of which hosts a launch uses: hostfiles and the filters of the ``deepspeed`` command, as pure data."""

from __future__ import annotations

from collections.abc import Mapping

from zeropipe.errors import ConfigError

Slots = dict[str, tuple[int, ...]]  # host -> the indices of its devices, in hostfile order


def parse_hostfile(text: str, name: str = "hostfile") -> Slots:
    """``host slots=N`` lines; ``#`` begins a comment. Raises ConfigError for another line or a repeated host."""
    hosts: Slots = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        host, slots = words[0], words[1:]
        count = slots[0].removeprefix("slots=") if len(slots) == 1 and slots[0].startswith("slots=") else ""
        if not count.isdecimal() or host in hosts:
            raise ConfigError(
                f"{name}, line {number}",
                expected="a host once, as 'name slots=N'",
                found=repr(line),
                fix="correct the line",
            )
        hosts[host] = tuple(range(int(count)))
    if not hosts:
        raise ConfigError(f"{name} names no host", fix="write a line such as 'localhost slots=2'")
    return hosts


def parse_filter(text: str, flag: str) -> dict[str, tuple[int, ...] | None]:
    """``host[:slot,slot...]`` joined by ``@``; None for all slots. Raises ConfigError for another form."""
    found: dict[str, tuple[int, ...] | None] = {}
    for part in text.split("@"):
        host, colon, slots = part.strip().partition(":")
        numbers = slots.split(",")
        if not host or host in found or (colon and not all(n.strip().isdecimal() for n in numbers)):
            raise ConfigError(
                flag, expected="host:slot,slot@host:slot", found=repr(text), fix=f"{flag}=localhost:0,1"
            )
        found[host] = tuple(sorted({int(n) for n in numbers})) if colon else None
    return found


def choose(
    hosts: Mapping[str, tuple[int, ...]],
    include: str = "",
    exclude: str = "",
    num_nodes: int | None = None,
    num_gpus: int | None = None,
) -> Slots:
    """The hosts and slots that are left; hosts without any are left out.

    Raises ConfigError for filters that exclude each other, name what is not there, or leave nothing.
    """
    if include and exclude:
        raise ConfigError("--include and --exclude exclude each other", fix="give one of them")
    if (include or exclude) and (num_nodes is not None or num_gpus is not None):
        raise ConfigError(
            "--include and --exclude say which slots are used; --num_nodes and --num_gpus say it again",
            fix="remove --num_nodes and --num_gpus",
        )
    named = (
        parse_filter(include or exclude, "--include" if include else "--exclude")
        if include or exclude
        else {}
    )
    for host, slots in named.items():
        missing = host not in hosts or set(slots or ()) - set(hosts[host])
        if missing:
            known = ", ".join(f"{name}:{','.join(map(str, there))}" for name, there in hosts.items())
            shown = host if slots is None else f"{host}:{','.join(map(str, slots))}"
            raise ConfigError(
                "--include" if include else "--exclude",
                expected=f"slots of {known}",
                found=shown,
                fix="name hosts and slots that exist",
            )
    # --include keeps what it names, --exclude what it does not; a host without slots means all of its slots.
    left: Slots = {}
    for host, there in hosts.items():
        listed = named.get(host, ())
        if include:
            left[host] = there if listed is None else listed
        else:
            left[host] = () if listed is None else tuple(s for s in there if s not in listed)
    left = {host: there for host, there in left.items() if there}
    if num_nodes is not None:
        _check_count("--num_nodes", num_nodes, len(left), "hosts")
        left = dict(list(left.items())[:num_nodes])
    if num_gpus is not None:
        for host, there in left.items():
            _check_count("--num_gpus", num_gpus, len(there), f"slots on {host}")
        left = {host: there[:num_gpus] for host, there in left.items()}
    if not left:
        raise ConfigError("no slot is left to run on", fix="widen --include, or narrow --exclude")
    return left


def _check_count(flag: str, wanted: int, there: int, what: str) -> None:
    if not 0 < wanted <= there:
        raise ConfigError(
            flag, expected=f"1 to {there} ({what})", found=wanted, fix=f"lower it, or leave {flag} out"
        )
