"""What was planned and what was measured, side by side, for people."""

import json
from pathlib import Path
from typing import Any

MB = 1e6
HEAD = """# Is the plan true?

`zeropipe plan` says what a run needs before it runs. Here it is run, on two gloo ranks of one thread each, and
compared. `python -m benchmarks.plan.run PART` makes each part (`--help`); the numbers are in `PART.json`.
"""
MEMORY = """## Bytes of a rank

States: what `zeropipe plan` has between two steps, and the engine's own `memory_report()`. Peak: what is alive at most
in the plan, and in the run, each beside the other's error:

- *allocated*: torch's CPU allocator, every block that its profiler is told of;
- *resident*: pages of the process (VmHWM) above those of a process that has trained a tiny engine of the same kind,
  with `MALLOC_MMAP_THRESHOLD_=65536` (freed blocks go back at once);
  with state in files their mapped pages count too, which the kernel takes back where memory is short;
- *default heap*: the same without that. What glibc keeps has no order that could be planned; the plan's verdict
  counts a bound of it, *kept*.

The worse of the two ranks, MB.
"""
LIMIT = """## No "fits" that does not

Random configurations (stage, dtype, accumulation, recompute, schedule, files, sizes), each in processes whose private
memory may grow by 0.8 to 1.6 times the planned peak (`RLIMIT_DATA`), half of them with freed memory going back at once.
"""
TIME = """## Seconds of a step

`zeropipe plan calibrate` measures the machine in each round, beside the runs; the least of the rounds counts on both
sides, since the machine is shared.
"""


def page(parts: dict[str, Path]) -> str:
    """README.md of the parts that are there."""
    found = {name: json.loads(path.read_text()) for name, path in parts.items() if path.is_file()}
    makers = {"memory": _memory, "limit": _limit, "time": _time, "peers": _peers}
    return "\n".join([HEAD, *(makers[name](data["rows"]) + _where(data) for name, data in found.items())])


def _where(data: dict[str, Any]) -> str:
    where = data["environment"]
    load = ", ".join(f"{value:.1f}" for value in where["load"])
    return (
        f"\n`{where['command']}`; {where['date']}, {where['cores']} cores ({where['cpu']}), load {load}, "
        f"Python {where['python']}, torch {where['torch']}\n"
    )


def _off(planned: float, measured: float) -> float:
    return planned / measured - 1 if measured else 0.0


def _worst(row: dict[str, Any], planned: str, measured: str) -> dict[str, Any]:
    return max(row["ranks"], key=lambda one: abs(_off(one[planned], one[measured])))


def memory_line(row: dict[str, Any]) -> str:
    states, allocated = _worst(row, "states", "measured states"), _worst(row, "peak", "allocated")
    resident = _worst(row, "peak", "resident")
    default = max(row["ranks"], key=lambda one: one["default heap"])
    return (
        f"| {row['case']} | {states['states'] / MB:.1f} | {_off(states['states'], states['measured states']):+.2%} "
        f"| {allocated['peak'] / MB:.1f} | {_off(allocated['peak'], allocated['allocated']):+.1%} "
        f"| {_off(resident['peak'], resident['resident']):+.1%} "
        f"| {default['default heap'] / MB:.0f} | {(default['peak'] + default['kept']) / MB:.0f} |"
    )


def _memory(rows: list[dict[str, Any]]) -> str:
    lines = [
        MEMORY,
        "| configuration | states | against the run | peak | against allocated | against resident | default heap "
        "| peak and kept |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *map(memory_line, rows),
    ]
    every = [one for row in rows for one in row["ranks"]]
    worst = {
        "states": max(abs(_off(one["states"], one["measured states"])) for one in every),
        "the peak against what is allocated": max(abs(_off(one["peak"], one["allocated"])) for one in every),
        "the peak against what is resident": max(abs(_off(one["peak"], one["resident"])) for one in every),
    }
    lines.append("\nWorst: " + "; ".join(f"{name} {value:.2%}" for name, value in worst.items()) + ".")
    return "\n".join(lines) + "\n"


def limit_line(row: dict[str, Any]) -> str:
    word = "fits" if row["fits"] else "does not fit"
    came = "trained" if row["trained"] else "did not train"
    heap = "goes back" if row["gives back"] else "default"
    ratio = row["allowance"] / row["peak"]
    return (
        f"| {row['seed']} | {row['case']} | {heap} | {row['peak'] / MB:.0f} | {ratio:.2f} | {word} | {came} |"
    )


def _limit(rows: list[dict[str, Any]]) -> str:
    counts = {
        (fits, trained): sum(row["fits"] is fits and row["trained"] is trained for row in rows)
        for fits in (True, False)
        for trained in (True, False)
    }
    wrong = [row for row in rows if row["fits"] and not row["trained"]]
    return "\n".join(
        [
            LIMIT,
            f"{len(rows)} were run:\n",
            "| | trained | did not train |",
            "|---|---:|---:|",
            f"| the plan said it fits | {counts[True, True]} | **{counts[True, False]}** |",
            f"| the plan said it does not | {counts[False, True]} | {counts[False, False]} |",
            *(["\nWrong:\n", *map(limit_line, wrong)] if wrong else []),
            "",
        ]
    )


def time_line(row: dict[str, Any]) -> str:
    bubble = "" if row["bubble"] is None else f"{row['bubble']:.0%}"
    return (
        f"| {row['case']} | {row['planned'] * 1e3:.0f} | {row['least'] * 1e3:.0f} | {row['median'] * 1e3:.0f} "
        f"| {_off(row['planned'], row['least']):+.0%} | {bubble} |"
    )


def _time(data: dict[str, Any]) -> str:
    return "\n".join(
        [
            TIME,
            "| configuration | planned, ms | least, ms | median, ms | planned against least | bubble |",
            "|---|---:|---:|---:|---:|---:|",
            *map(time_line, data["rows"]),
            "",
        ]
    )


def _peers(rows: list[dict[str, Any]]) -> str:
    lines = [
        "## Beside other estimators\n",
        "Each says what a run of its own system takes, and that is what was run: the most bytes that torch's allocator "
        "has given out on a rank, MB.\n",
        "| model | estimator | of | says | measured | error |",
        "|---|---|---|---:|---:|---:|",
    ]
    for row in rows:
        says, measured = row["says"], row["measured"]
        lines.append(
            f"| {row['model']} | {row['estimator']} | {row['of']} | {says / MB:.0f} | {measured / MB:.0f} "
            f"| {_off(says, measured):+.0%} |"
        )
    return "\n".join(lines) + "\n"
