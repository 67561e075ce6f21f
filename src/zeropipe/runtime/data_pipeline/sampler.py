"""Which samples a step draws: those that are not too difficult yet, each once before any comes again.

A place in the run is data, and drawing is a function of it: ``place -> (place after it, samples)``. So a data loader
may draw ahead, and a run that was resumed at another number of ranks draws what was left::

    deck   | what the present pass has left, shuffled |
             the difficulty grows: newcomers are shuffled in      the deck is empty: all that are allowed, shuffled
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from zeropipe.config.schema_data import DataEfficiency
from zeropipe.errors import CheckpointError, ConfigError, UsageError
from zeropipe.given import DataLike, ProcessGroup
from zeropipe.runtime.curriculum import CurriculumScheduler
from zeropipe.runtime.data_pipeline.indexed import MMapIndexedDataset

Numbers = NDArray[np.int64]
Convert = Callable[[Any, dict[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run is. The deck is never written to, so places share it."""

    consumed: int  # samples, over all ranks
    step: int  # optimizer steps that have begun
    in_step: int  # samples of the one that runs; 0 between two
    difficulties: dict[str, int]  # by metric
    shuffles: int
    deck: Numbers


class Metric:
    """One measure of difficulty: a level for each sample, and what level a step allows."""

    def __init__(self, name: str, section: Mapping[str, Any], samples: int) -> None:
        self.name = name
        self.schedule = CurriculumScheduler(section)
        # One cluster: nothing is left out, and only the data's own code asks for the difficulty.
        self.levels: Numbers | None = None
        if section.get("clustering_type", "schedule_based") == "single_cluster":
            return
        by, rows = section.get("difficulty_type", "value"), self._rows(section, "index_to_sample_path")
        if by not in ("value", "percentile"):
            raise UsageError(
                f"curriculum metric {name!r}: difficulty_type", expected="value or percentile", found=by
            )
        # A sample that no row names is as difficult as can be.
        self.levels = np.full(samples, np.iinfo(np.int64).max, np.int64)
        values = self._rows(section, "index_to_metric_path") if by == "value" else None
        counted, place = sum(int(size) for size in rows.sizes), 0
        for number in range(len(rows)):
            members = rows.get(number).astype(np.int64)
            if members.size and int(members.max()) >= samples:
                raise UsageError(
                    f"curriculum metric {name!r} knows sample {int(members.max())}",
                    expected=f"samples below {samples}, of the dataset that is trained on",
                )
            if values is None:
                # In percent, rounded up, of all samples in the order of the rows.
                self.levels[members] = (place + np.arange(members.size)) * 100 // counted + 1
            else:
                self.levels[members] = int(values.get(number)[0])
            place += members.size

    def _rows(self, section: Mapping[str, Any], key: str) -> MMapIndexedDataset:
        if not section.get(key):
            raise UsageError(
                f"curriculum metric {self.name!r}: {key} is missing",
                fix="give the path that DataAnalyzer wrote, without .bin and .idx",
            )
        return MMapIndexedDataset(section[key])


class DeepSpeedDataSampler:
    """Micro-batches of this rank, as lists of sample numbers: a ``batch_sampler`` for a DataLoader.

    ``data_efficiency_config``: the section ``data_efficiency``, as a dict or parsed. ``one_epoch_total_samples``: of
    the dataset, of which ``num_epochs`` times as many are drawn in all. ``drop_last``: leave out what does not fill
    every rank's last micro-batch; else it is filled with samples that come again. All ranks draw alike, from the seed.

    Raises ConfigError or UsageError for a schedule or files that cannot be used.
    """

    def __init__(
        self,
        data_efficiency_config: Mapping[str, Any] | DataEfficiency,
        one_epoch_total_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        data_parallel_group: ProcessGroup = None,
        gradient_accumulation_steps: int = 1,
        global_rank: int = 0,
        drop_last: bool = True,
    ) -> None:
        given = data_efficiency_config
        section = given if isinstance(given, Mapping) else given.model_dump()
        sampling = section.get("data_sampling", {})
        self._samples, self._seed = one_epoch_total_samples, int(section.get("seed", 1234))
        self.total_samples = one_epoch_total_samples * int(sampling.get("num_epochs", 1000))
        self._rank, self._micro, self._drop_last = data_parallel_rank, micro_batch_size, drop_last
        self._batch = micro_batch_size * data_parallel_size  # of all ranks
        self._per_step = self._batch * gradient_accumulation_steps
        curriculum = sampling.get("curriculum_learning", {})
        named = curriculum.get("curriculum_metrics", {}) if curriculum.get("enabled", False) else {}
        self._metrics = [Metric(name, metric, one_epoch_total_samples) for name, metric in named.items()]
        self.place = Place(0, 0, 0, {}, 0, np.empty(0, np.int64))

    def __len__(self) -> int:
        """Samples of the whole run, over all ranks."""
        return self.total_samples

    @property
    def micro_batches(self) -> int:
        """Of the whole run, on each rank."""
        whole, rest = divmod(self.total_samples, self._batch)
        return whole + (rest > 0 and not self._drop_last)

    def set_custom_curriculum_learning_schedule(
        self, schedule_func_dict: Mapping[str, Callable[[int], int]]
    ) -> None:
        """By metric: the difficulty of a step, counted from 1."""
        for metric in self._metrics:
            if metric.name in schedule_func_dict:
                metric.schedule.set_custom_get_difficulty(schedule_func_dict[metric.name])

    def __iter__(self) -> Iterator[list[int]]:
        for place, mine in self.walk(self.place):
            self.place = place
            yield mine

    def walk(self, place: Place) -> Iterator[tuple[Place, list[int]]]:
        """From ``place`` on, each micro-batch of this rank and the place after it."""
        while place.consumed + (self._batch if self._drop_last else 1) <= self.total_samples:
            place, drawn = self._draw(place)
            yield place, drawn[self._rank * self._micro : (self._rank + 1) * self._micro].tolist()

    def _draw(self, place: Place) -> tuple[Place, Numbers]:
        # One that was begun where steps were larger than here is over.
        if place.in_step == 0 or place.in_step >= self._per_step:
            place = self._begin_step(place)
        # A batch may be larger than what is allowed: then samples come again in it.
        drawn: list[Numbers] = []
        missing = self._batch
        while missing:
            if not place.deck.size:
                place = self._shuffled(place, self._allowed(place.difficulties))
            drawn.append(place.deck[:missing])
            missing -= drawn[-1].size
            place = replace(place, deck=place.deck[drawn[-1].size :])
        # The end of a step is 0, and not its size, which may be another where this place is loaded.
        in_step = place.in_step + self._batch
        after = replace(place, in_step=0 if in_step >= self._per_step else in_step)
        return replace(after, consumed=place.consumed + self._batch), np.concatenate(drawn)

    def _begin_step(self, place: Place) -> Place:
        step = place.step + 1
        now = {metric.name: metric.schedule.get_difficulty(step) for metric in self._metrics}
        after = replace(place, step=step, in_step=0, difficulties=now)
        if step == 1 or now == place.difficulties:
            return after
        known = self._allowed(place.difficulties)
        newcomers = np.setdiff1d(self._allowed(now), known, assume_unique=True)
        return self._shuffled(after, np.concatenate((place.deck, newcomers))) if newcomers.size else after

    def _allowed(self, difficulties: Mapping[str, int]) -> Numbers:
        allowed = np.ones(self._samples, bool)
        for metric in self._metrics:
            if metric.levels is not None:
                allowed &= metric.levels <= difficulties[metric.name]
        found = np.flatnonzero(allowed)
        if not found.size:
            raise UsageError(
                "the curriculum leaves no sample to train on",
                found=", ".join(f"{name} at most {level}" for name, level in difficulties.items()),
                fix="raise min_difficulty of these metrics",
            )
        return found

    def _shuffled(self, place: Place, deck: Numbers) -> Place:
        random = np.random.default_rng([self._seed, place.shuffles])
        return replace(place, shuffles=place.shuffles + 1, deck=random.permutation(deck))

    def state_dict(self) -> dict[str, Any]:
        """The place, the same on every rank."""
        return self.state_of(self.place)

    def state_of(self, place: Place) -> dict[str, Any]:
        return {
            "consumed_samples": place.consumed,
            "curriculum_step": place.step,
            "in_step": place.in_step,
            "current_difficulties": dict(place.difficulties),
            "shuffles": place.shuffles,
            "deck": torch.from_numpy(place.deck.copy()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a place; micro-batch and ranks may be others. Raises CheckpointError for another loader's state."""
        self.place = self.place_of(state)

    def place_of(self, state: Mapping[str, Any]) -> Place:
        if "deck" not in state:
            raise CheckpointError(
                "the data position was not saved by a curriculum's sampler",
                found=f"keys {', '.join(map(str, state))}",
                fix="resume with the section data_efficiency that was trained with, or do not load its position",
            )
        return Place(
            state["consumed_samples"],
            state["curriculum_step"],
            state["in_step"],
            dict(state["current_difficulties"]),
            state["shuffles"],
            np.asarray(state["deck"]).copy(),
        )


class _Drawing(torch.utils.data.Sampler[list[int]]):
    """What a DataLoader takes for a batch sampler: an iterator is begun where the function says."""

    def __init__(self, begin: Callable[[], Iterator[list[int]]]) -> None:
        self._begin = begin

    def __iter__(self) -> Iterator[list[int]]:
        return self._begin()


class SampledLoader:
    """Micro-batches as a ``DeepSpeedDataSampler`` draws them; ``state_dict`` counts every one that was yielded."""

    def __init__(
        self,
        dataset: DataLike,
        sampler: DeepSpeedDataSampler,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.dataset, self.data_sampler = dataset, sampler
        self._made: Convert | None = None
        # The place of what was yielded, and the places of what workers load already.
        self._place, self._drawn = sampler.place, deque[Place]()
        self._loader: Any = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=_Drawing(self._draw),
            collate_fn=collate_fn,
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else each iteration would draw from torch's global state
        )

    def _draw(self) -> Iterator[list[int]]:
        self._drawn.clear()
        for place, mine in self.data_sampler.walk(self._place):
            self._drawn.append(place)
            yield mine

    def __len__(self) -> int:
        """Micro-batches of the whole run on this rank."""
        return self.data_sampler.micro_batches

    def __iter__(self) -> Iterator[Any]:
        """From the place where the last one was yielded, to the end of the run."""
        for batch in self._loader:
            self._place = self._drawn.popleft()
            yield (batch if self._made is None else self._made(batch, self.state_dict()))

    def post_process(self, made: Convert | None) -> None:
        """Yield ``made(batch, state)``; ``state``: the place after the batch, with its ``current_difficulties``."""
        self._made = made

    def state_dict(self) -> dict[str, Any]:
        return self.data_sampler.state_of(self._place)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises CheckpointError for another kind of loader's state."""
        self._place = self.data_sampler.place_of(state)


def sampled_loader(
    data: DataLike,
    section: DataEfficiency,
    micro_batch_size: int,
    accumulation: int,
    place: tuple[int, int],
    collate_fn: Callable[[list[Any]], Any] | None,
) -> SampledLoader:
    """The loader that the section asks for; ``place``: this rank among those that share the samples, and their number.

    Raises ConfigError where the data has no length.
    """
    if not hasattr(data, "__len__"):
        raise ConfigError(
            "config section 'data_efficiency.data_sampling.curriculum_learning' with training data without a length",
            expected="a dataset with a length, of which samples are drawn by number",
            found=type(data).__name__,
            fix="give such a dataset, or remove the section",
        )
    sampler = DeepSpeedDataSampler(
        section, len(data), micro_batch_size, *place, gradient_accumulation_steps=accumulation
    )
    sampling = section.data_sampling
    return SampledLoader(data, sampler, collate_fn, sampling.num_workers, sampling.pin_memory)
