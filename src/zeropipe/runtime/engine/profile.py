"""The configuration's section ``flops_profiler``: one forward is profiled, and told after its step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zeropipe.comm.collectives import all_gather_object
from zeropipe.runtime.engine.parts import Parts
from zeropipe.runtime.flops import FlopsProfiler, ModuleProfile, describe_profile, tell


class ScheduledProfile:
    """Measures on rank 0; of a pipeline on one rank of each stage, for rank 0 to tell of all stages."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self._section = parts, parts.config.flops_profiler
        measures = parts.group.rank == 0 if parts.stages.size > 1 else parts.first
        # The step to profile has not been told yet. A rehearsal takes no time that could be told.
        self._waits = self._section.enabled and measures and not parts.group.imagined
        self._rows: tuple[ModuleProfile, ...] = ()

    @property
    def due(self) -> bool:
        """Whether the coming forward is the one."""
        clock, module = self._parts.clock, self._parts.module
        at_step = self._waits and clock.global_steps == self._section.profile_step
        return at_step and module.training and not self._rows

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around that forward; one that raises is measured again."""
        profiler = FlopsProfiler(self._parts.module)
        profiler.start_profile()
        try:
            yield
            self._rows = profiler.rows()
        finally:
            profiler.end_profile()

    def tell(self) -> None:
        """After a step: print the profile or write its file; collective over a pipeline's measuring ranks."""
        if not self._rows:
            return
        stages = self._parts.stages
        every = all_gather_object(self._rows, stages, label="flops_profiler")
        section, parts, self._waits = self._section, [], False
        self._rows = ()
        for stage, rows in enumerate(every):
            of = f"pipeline stage {stage} of {stages.size}: " if stages.size > 1 else ""
            text = describe_profile(
                rows,
                section.profile_step,
                section.module_depth,
                section.top_modules,
                section.detailed,
                section.recompute_fwd_factor,
            )
            parts.append(f"{of}{text}")
        if self._parts.first:
            tell("\n\n".join(parts), section.output_file)
