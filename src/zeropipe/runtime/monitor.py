"""Scalars of a run, written where the config says: CSV files, TensorBoard, Weights & Biases."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from zeropipe.errors import ConfigError

if TYPE_CHECKING:
    from zeropipe.config.schema import Config, CsvMonitor, TensorBoard, Wandb

Event = tuple[str, Any, int]  # name such as "Train/Samples/lr", number or one-element tensor, step


class Writer(Protocol):
    def write(self, events: list[tuple[str, float, int]]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class CsvWriter:
    """One file per event name, ``output_path/job_name/Name_with_underscores.csv``, rows ``step,value``.

    A file that exists is appended to, so that a resumed run goes on in it.
    """

    def __init__(self, section: CsvMonitor) -> None:
        self._folder = Path(section.output_path or "csv_monitor") / section.job_name
        self._folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, TextIO] = {}

    def write(self, events: list[tuple[str, float, int]]) -> None:
        for name, value, step in events:
            if name not in self._files:
                path = self._folder / (name.replace("/", "_").replace(" ", "_") + ".csv")
                self._files[name] = path.open("a", newline="")
                if self._files[name].tell() == 0:
                    csv.writer(self._files[name]).writerow(["step", name.rsplit("/", 1)[-1]])
            csv.writer(self._files[name]).writerow([step, value])
        # A killed run keeps what it wrote.
        self.flush()

    def flush(self) -> None:
        for file in self._files.values():
            file.flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


class TensorBoardWriter:
    """torch's SummaryWriter in ``output_path/job_name``."""

    def __init__(self, section: TensorBoard) -> None:
        module = _optional("torch.utils.tensorboard", "tensorboard")
        self._writer: Any = module.SummaryWriter(str(Path(section.output_path or "runs") / section.job_name))

    def write(self, events: list[tuple[str, float, int]]) -> None:
        for name, value, step in events:
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """A Weights & Biases run in the project, group and team that the config names."""

    def __init__(self, section: Wandb) -> None:
        module = _optional("wandb", "wandb")
        self._run: Any = module.init(project=section.project, group=section.group, entity=section.team)

    def write(self, events: list[tuple[str, float, int]]) -> None:
        # One call a step: Weights & Biases counts its calls as steps.
        by_step: dict[int, dict[str, float]] = {}
        for name, value, step in events:
            by_step.setdefault(step, {})[name] = value
        for step, values in by_step.items():
            self._run.log(values, step=step)

    def flush(self) -> None:
        """Weights & Biases sends in the background; there is nothing to flush."""

    def close(self) -> None:
        self._run.finish()


class MonitorMaster:
    """All writers that the config enables; none at all where ``enabled`` is False (every rank but one).

    Raises ConfigError where a writer's package is missing, naming the extra that brings it.
    """

    def __init__(self, config: Config, enabled: bool = True) -> None:
        self._writers: list[Writer] = []
        if enabled and config.csv_monitor.enabled:
            self._writers.append(CsvWriter(config.csv_monitor))
        if enabled and config.tensorboard.enabled:
            self._writers.append(TensorBoardWriter(config.tensorboard))
        if enabled and config.wandb.enabled:
            self._writers.append(WandbWriter(config.wandb))

    @property
    def enabled(self) -> bool:
        """Whether anything is written here: where it is False the caller can save itself the numbers."""
        return bool(self._writers)

    def write_events(self, events: Iterable[Event]) -> None:
        # Numbers may be tensors: reading one waits for its device, so not where nobody writes it.
        if not self._writers:
            return
        plain = [(name, float(value), int(step)) for name, value, step in events]
        for writer in self._writers:
            writer.write(plain)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Close all writers; what is written afterwards is dropped. It may be called again."""
        # First out of use: a writer that raises here is not closed again.
        writers, self._writers = self._writers, []
        for writer in writers:
            writer.close()


def _optional(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{extra}.enabled is true, but the package {extra} is not installed",
            fix=f"pip install 'zeropipe[{extra}]', or set {extra}.enabled to false",
        ) from error
