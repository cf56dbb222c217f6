"""Monitors: scalars of each step, to CSV files or to TensorBoard."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Protocol

import offload

from ._settings import Monitor, Settings

__all__ = ["CsvMonitor", "TensorBoardMonitor", "Writer", "make_writers"]


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


def make_writers(settings: Settings) -> list[Writer]:
    """The enabled monitors."""
    writers: list[Writer] = []
    if settings.csv_monitor.enabled:
        writers.append(CsvMonitor(settings.csv_monitor))
    if settings.tensorboard.enabled:
        writers.append(TensorBoardMonitor(settings.tensorboard))
    return writers
