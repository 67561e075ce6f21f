"""Resident memory of this process, and the most of it since a chosen moment (Linux, from /proc)."""

from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): writing 5 sets the peak (VmHWM) back to what is resident now


def reset_peak() -> None:
    CLEAR_REFS.write_text(RESET_PEAK)


def resident() -> int:
    """Bytes resident now."""
    return _field("VmRSS")


def peak_resident() -> int:
    """The most bytes resident at once since `reset_peak`."""
    return _field("VmHWM")


def _field(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {name}")
