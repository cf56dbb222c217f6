"""Monitors: scalars of each step, to CSV files or to TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import offload

from ._settings import Monitor, Settings

__all__ = ["CsvMonitor", "Monitors", "TensorBoardMonitor"]


Events = Iterable[tuple[str, Any, int]]


class _Monitor:
    """What writes the scalars of one section of the config; `output_path` and `job_name` are the section's."""

    enabled = True

    def __init__(self, settings: Monitor, default_path: str) -> None:
        self.output_path = settings.output_path
        self.job_name = settings.job_name
        self.log_dir = str(Path(settings.output_path or default_path) / settings.job_name)


class CsvMonitor(_Monitor):
    """A file a scalar: `<output_path>/<job_name>/Train_Samples_lr.csv`, lines of samples and value."""

    def __init__(self, settings: Monitor) -> None:
        super().__init__(settings, "csv_monitor")
        Path(self.log_dir).mkdir(parents=True, exist_ok=True)

    def write_events(self, events: Events) -> None:
        """Writes (name, number, samples seen so far); a number may be a tensor of one element."""
        for name, value, samples in events:
            path = Path(self.log_dir) / (name.replace("/", "_").replace(" ", "_") + ".csv")
            is_new = not path.exists()
            with path.open("a", newline="") as file:
                lines = csv.writer(file)
                if is_new:
                    lines.writerow(["step", name.rsplit("/", 1)[-1]])
                lines.writerow([samples, float(value)])


class TensorBoardMonitor(_Monitor):
    """An event file under `<output_path>/<job_name>`; `summary_writer` is torch's, for what is no scalar."""

    def __init__(self, settings: Monitor) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise offload.InvalidArgument(
                "tensorboard.enabled is true, and the package tensorboard is not installed: pip install tensorboard, "
                "or use csv_monitor"
            ) from error
        super().__init__(settings, "runs")
        self.summary_writer: Any = SummaryWriter(log_dir=self.log_dir)

    def write_events(self, events: Events, flush: bool = True) -> None:
        """As `CsvMonitor`'s."""
        for name, value, samples in events:
            self.summary_writer.add_scalar(name, float(value), samples)
        if flush:
            self.flush()

    def flush(self) -> None:
        self.summary_writer.flush()


class Monitors:
    """What the config enables. Scripts write scalars of their own through it: `engine.monitor.write_events(...)`.

    tb_monitor, csv_monitor: None where the config does not enable them. There are no others.
    """

    wandb_monitor = comet_monitor = None

    def __init__(self, settings: Settings) -> None:
        self.csv_monitor = CsvMonitor(settings.csv_monitor) if settings.csv_monitor.enabled else None
        self.tb_monitor = TensorBoardMonitor(settings.tensorboard) if settings.tensorboard.enabled else None

    @property
    def enabled(self) -> bool:
        """Whether anything is written."""
        return self.csv_monitor is not None or self.tb_monitor is not None

    def write_events(self, events: Events) -> None:
        """Writes (name, number, samples seen so far); a number may be a tensor of one element."""
        events = list(events) if self.enabled else []
        for monitor in (self.csv_monitor, self.tb_monitor):
            if monitor is not None:
                monitor.write_events(events)
