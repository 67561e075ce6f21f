"""Resident memory of this process, and the most of it since a chosen moment (Linux, from /proc)."""

from pathlib import Path

STATUS = Path("/proc/self/status")
ROLLUP = Path("/proc/self/smaps_rollup")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): writing 5 sets the peak (VmHWM) back to what is resident now


def reset_peak() -> None:
    CLEAR_REFS.write_text(RESET_PEAK)


def resident() -> int:
    """Bytes resident now; of memory that processes share each its part."""
    return _field("VmRSS") - _shared_elsewhere()


def peak_resident() -> int:
    """The most bytes resident at once since `reset_peak`, if as much was shared then as now."""
    return _field("VmHWM") - _shared_elsewhere()


def _shared_elsewhere() -> int:
    """What other processes have of the shared memory that is resident here, so that all together count it once."""
    return _field("RssShmem") - _field("Pss_Shmem", ROLLUP)


def _field(name: str, file: Path = STATUS) -> int:
    for line in file.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{file} has no {name}")
