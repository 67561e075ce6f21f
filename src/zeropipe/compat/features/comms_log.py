"""``deepspeed.comm.comms_logger``: the counts of this process's collectives in the words that scripts know."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from zeropipe.comm.log import log_summary
from zeropipe.comm.record import SEAM
from zeropipe.comm.summary import carriers
from zeropipe.given import Anything

# operation -> {bytes -> [count, ms of each call, Gbit/s of each, Gbit/s of each on the bus]}
Raw = dict[str, dict[int, list[Any]]]


class CommsLogger:
    """A view of what the section ``comms_logger`` counts; all of them show the one log of the process."""

    verbose: Final = False
    debug: Final = False

    @property
    def enabled(self) -> bool:
        return SEAM.log.on

    @property
    def prof_all(self) -> bool:
        return SEAM.log.only is None

    @property
    def prof_ops(self) -> list[str]:
        """The operations that are counted where not all are."""
        return sorted(SEAM.log.only or ())

    @property
    def comms_dict(self) -> Raw:
        """What was counted. Calls of one size are summed, so each has their mean: sums and means are true."""
        raw: Raw = {}
        for one in SEAM.log.tallies():
            mean = one.seconds / one.count
            wire, bus = (size * 8e-9 / mean if mean else 0.0 for size in (one.bytes, one.bus_bytes))
            found = raw.setdefault(one.op, {}).setdefault(one.bytes, [0, [], [], []])
            found[0] += one.count
            for values, value in zip(found[1:], (mean * 1e3, wire, bus), strict=True):
                values.extend([value] * one.count)
        return raw

    def configure(self, comms_config: Anything) -> None:
        """Count as the section ``comms_logger`` of a parsed configuration says."""
        section: Any = getattr(comms_config, "comms_logger", comms_config)
        if section.enabled:
            SEAM.log.start(None if section.prof_all else section.prof_ops)
        else:
            SEAM.log.stop()

    def start_profiling_comms(self) -> None:
        """Count all operations from now on."""
        SEAM.log.start()

    def stop_profiling_comms(self) -> None:
        """Count no more; what was counted stays."""
        SEAM.log.stop()

    def start_profiling_op(self, op_name_list: Collection[str]) -> None:
        """Count these operations too."""
        if not SEAM.log.on:
            SEAM.log.start(op_name_list)
        elif SEAM.log.only is not None:
            SEAM.log.start(SEAM.log.only.union(carriers(op_name_list)))

    def stop_profiling_op(self, op_name_list: Collection[str]) -> None:
        """Leave these out, where operations were named."""
        if SEAM.log.on and SEAM.log.only is not None:
            SEAM.log.start(SEAM.log.only.difference(carriers(op_name_list)))

    def log_summary(self, show_straggler: bool = False) -> None:
        """``deepspeed.comm.log_summary``."""
        log_summary(show_straggler)

    def log_all(
        self, print_log: bool = True, show_straggler: bool = False, return_dict: bool = False
    ) -> Raw | None:
        """Print the table on rank 0; with ``return_dict`` also hand out ``comms_dict``."""
        if print_log:
            log_summary(show_straggler)
        return self.comms_dict if return_dict else None

    def has_data(self) -> bool:
        return bool(SEAM.log.tallies())

    def get_raw_data(self) -> Raw:
        return self.comms_dict

    def reset_data(self) -> None:
        """Forget what was counted."""
        SEAM.log.reset()


comms_logger: Final = CommsLogger()
