"""How difficult each sample of a dataset is: metrics of all samples, in the files that the sampler reads.

Of a metric of single samples, in ``SAVE_PATH/METRIC/``::

    METRIC_sample_to_metric                   row i: the value of sample i
    METRIC_index_to_metric                    row i: the i-th smallest value
    METRIC_index_to_sample                    row i: the samples of that value
    METRIC_index_to_sample_percentile_merged  the same; shares of the whole are counted when it is read
    METRIC_metric_value                       of a metric over all samples: its sum
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zeropipe.errors import UsageError
from zeropipe.given import Anything, DataLike
from zeropipe.runtime.data_pipeline.indexed import write_rows

SINGLE, SUMMED = "single_value_per_sample", "accumulate_value_over_samples"


class DataAnalyzer:
    """Metrics of ``dataset``: ``run_map`` on each of ``num_workers`` processes, then ``run_reduce`` on one.

    ``metric_functions``: of a batch, collated by ``collate_fn``, to a tensor: one whole number for each sample
    (``single_value_per_sample``), or one tensor that is summed over batches (``accumulate_value_over_samples``).
    ``sample_indices``: the numbers under which samples are known, default their places. Threads are one here.

    Raises UsageError for lists of different lengths, an unknown type, values that are no whole numbers or not one for
    each sample, and a worker whose part is missing when they are put together.
    """

    def __init__(
        self,
        dataset: DataLike,
        num_workers: int = 1,
        worker_id: int = 0,
        num_threads: int = 1,
        num_threads_reduce: int = 1,
        specific_threads: Sequence[int] = (),
        batch_size: int = 1,
        metric_names: Sequence[str] = (),
        metric_functions: Sequence[Callable[[Any], torch.Tensor]] = (),
        metric_types: Sequence[str] = (),
        metric_dtypes: Sequence[Anything] = (),
        save_path: str = "./",
        collate_fn: Callable[[list[Any]], Any] | None = None,
        sample_indices: Sequence[int] | None = None,
        **_: Anything,
    ) -> None:
        counts = {len(metric_names), len(metric_functions), len(metric_types)}
        if len(counts) > 1:
            raise UsageError(
                "DataAnalyzer: names, functions and types of metrics", expected="as many of each"
            )
        for kind in metric_types:
            if kind not in (SINGLE, SUMMED):
                raise UsageError("DataAnalyzer: metric_types", expected=f"{SINGLE} or {SUMMED}", found=kind)
        self._dataset, self._batch_size, self._collate = dataset, batch_size, collate_fn
        self._workers, self._worker = num_workers, worker_id
        self._metrics = list(zip(metric_names, metric_functions, metric_types, strict=True))
        self._folder, self._numbers = Path(save_path), sample_indices

    def _part(self, name: str, worker: int) -> Path:
        return self._folder / name / f"worker{worker}.npy"

    def run_map(self) -> None:
        """Compute this worker's share, a run of samples, and write it beside the others'."""
        total = len(self._dataset)
        share = range(total * self._worker // self._workers, total * (self._worker + 1) // self._workers)
        loader: Any = torch.utils.data.DataLoader(
            torch.utils.data.Subset(self._dataset, share), self._batch_size, collate_fn=self._collate
        )
        found: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name, _, _ in self._metrics}
        done = 0
        for batch in loader:
            count = min(self._batch_size, len(share) - done)
            done += count
            for name, function, kind in self._metrics:
                values = function(batch).detach().cpu()
                if values.is_floating_point() or (kind == SINGLE and values.numel() != count):
                    raise UsageError(
                        f"DataAnalyzer: metric {name!r}",
                        expected="whole numbers"
                        + (f", one for each of {count} samples" if kind == SINGLE else ""),
                        found=f"{tuple(values.shape)} {values.dtype}",
                    )
                array = values.reshape(-1).to(torch.int64).numpy()
                found[name] = [*found[name], array] if kind == SINGLE else [sum(found[name], start=array)]
        for name, rows in found.items():
            path = self._part(name, self._worker)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.concatenate(rows) if rows else np.empty(0, np.int64))

    def run_reduce(self) -> None:
        """Put the shares of all workers together, when all have run."""
        for name, _, kind in self._metrics:
            missing = [w for w in range(self._workers) if not self._part(name, w).exists()]
            if missing:
                raise UsageError(
                    f"DataAnalyzer: metric {name!r} lacks the parts of workers {missing}",
                    fix="run run_map() on each worker, with the same save_path, before run_reduce()",
                )
            parts = [np.load(self._part(name, worker)) for worker in range(self._workers)]
            to = f"{self._folder / name / name}_"
            if kind == SUMMED:
                write_rows(f"{to}metric_value", [sum(p for p in parts if p.size)])
                continue
            values = np.concatenate(parts)
            numbers = np.arange(len(values)) if self._numbers is None else np.asarray(self._numbers)
            # Stable: samples of one value stay in their order.
            order = np.argsort(values, kind="stable")
            levels, starts = np.unique(values[order], return_index=True)
            groups = np.split(numbers[order], starts[1:])
            write_rows(f"{to}sample_to_metric", list(values.reshape(-1, 1)))
            write_rows(f"{to}index_to_metric", list(levels.reshape(-1, 1)))
            for what in ("index_to_sample", "index_to_sample_percentile_merged"):
                write_rows(f"{to}{what}", groups)

    def run_map_reduce(self, comm_group: Anything = None) -> None:
        """Both, in one process for all workers."""
        for worker in range(self._workers):
            self._worker = worker
            self.run_map()
        self.run_reduce()
