"""Monitors: scalars of each step, to CSV files or to TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import offload

from ._settings import Monitor, Settings

__all__ = ["CsvMonitor", "Monitors", "TensorBoardMonitor", "Writer"]


class Writer(Protocol):
    """Takes (name, value, samples seen so far) of a step."""

    def write(self, name: str, value: float, samples: int) -> None: ...


class CsvMonitor:
    """A file a scalar: `<output_path>/<job_name>/Train_Samples_lr.csv`, lines of samples and value."""

    def __init__(self, settings: Monitor) -> None:
        self._folder = Path(settings.output_path or "csv_monitor") / settings.job_name
        self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, value: float, samples: int) -> None:
        path = self._folder / (name.replace("/", "_").replace(" ", "_") + ".csv")
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            lines = csv.writer(file)
            if is_new:
                lines.writerow(["step", name.rsplit("/", 1)[-1]])
            lines.writerow([samples, value])


class TensorBoardMonitor:
    """An event file under `<output_path>/<job_name>`."""

    def __init__(self, settings: Monitor) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise offload.InvalidArgument(
                "tensorboard.enabled is true, and the package tensorboard is not installed: pip install tensorboard, "
                "or use csv_monitor"
            ) from error
        folder = Path(settings.output_path or "runs") / settings.job_name
        self._writer: Any = SummaryWriter(log_dir=str(folder))

    def write(self, name: str, value: float, samples: int) -> None:
        self._writer.add_scalar(name, value, samples)
        self._writer.flush()


class Monitors:
    """What the config enables. Scripts write scalars of their own through it: `engine.monitor.write_events(...)`."""

    def __init__(self, settings: Settings) -> None:
        self._writers: list[Writer] = []
        if settings.csv_monitor.enabled:
            self._writers.append(CsvMonitor(settings.csv_monitor))
        if settings.tensorboard.enabled:
            self._writers.append(TensorBoardMonitor(settings.tensorboard))

    @property
    def enabled(self) -> bool:
        """Whether anything is written."""
        return bool(self._writers)

    def write_events(self, events: Iterable[tuple[str, Any, int]]) -> None:
        """Writes (name, number, samples seen so far); a number may be a tensor of one element."""
        for name, value, samples in events if self._writers else ():
            number = float(value)
            for writer in self._writers:
                writer.write(name, number, samples)
