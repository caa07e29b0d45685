"""What is on disk of one run of a sweep. Its state is read from here alone, so that a kill at any moment loses nothing.

<sweep folder>/runs/<sweep>_<values>_<key>/
  config.yaml      the run's settings
  console.log      what its process printed, all attempts; of several that train together, in the first one's folder
  members.yaml     in the first one's folder: the settings of all of them
  failed.json      reason and exit code, if the last attempt failed
  <run_name>_<time>/    the run's own folder (checkpoint/run_dir.py); it has a summary.json when it is finished
"""

import json
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from e2e_sae.checkpoint.files import read_json, write_json, write_text
from e2e_sae.checkpoint.run_dir import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, RunDir
from e2e_sae.config import Config
from e2e_sae.sweeps.plan import PlannedRun

Status = Literal["finished", "failed", "interrupted", "not started"]


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; it need not exist."""

    path: Path
    """Where."""

    @classmethod
    def of(cls, run: PlannedRun, sweep_dir: Path) -> "RunFolder":
        """Returns the folder of a run: found by its key, whatever the rest of its name."""
        runs = sweep_dir / "runs"
        found = sorted(runs.glob(f"*_{run.key}"))
        name = re.sub(r"[^\w.,+=-]+", "_", run.label)[:100]
        return cls(found[0] if found else runs / f"{name}_{run.key}")

    def prepare(self, run: PlannedRun) -> Config:
        """Makes it, with the config, which is returned, and forgets an earlier failure."""
        self.path.mkdir(parents=True, exist_ok=True)
        config = run.config.model_copy(update={"save_dir": self.path})
        write_text(self.config_file, config.to_yaml())
        self._failure_file.unlink(missing_ok=True)
        return config

    @property
    def config_file(self) -> Path:
        """`config.yaml`."""
        return self.path / "config.yaml"

    @property
    def log_file(self) -> Path:
        """`console.log`."""
        return self.path / "console.log"

    @property
    def group_file(self) -> Path:
        """`members.yaml`; in the folder of the first of several runs that have begun together."""
        return self.path / "members.yaml"

    @property
    def _failure_file(self) -> Path:
        return self.path / "failed.json"

    @property
    def run_dir(self) -> Path | None:
        """The run's own folder: the finished one, else the newest; None if there is none yet."""
        found = sorted(p.parent for p in self.path.glob(f"*/{CONFIG_FILE}"))
        finished = [p for p in found if (p / SUMMARY_FILE).exists()]
        return (finished or found or [None])[-1]

    @property
    def status(self) -> Status:
        """How far it is."""
        if self.run_dir is not None and (self.run_dir / SUMMARY_FILE).exists():
            return "finished"
        if self._failure_file.exists():
            return "failed"
        return "interrupted" if self.run_dir is not None else "not started"

    @property
    def stage(self) -> str | None:
        """From where it goes on: the name of its newest checkpoint; None: it has not begun."""
        return None if self.run_dir is None else next((path.name for path in RunDir(self.run_dir).checkpoints()), "")

    @property
    def failure(self) -> str | None:
        """Why its last attempt failed."""
        return read_json(self._failure_file)["reason"] if self._failure_file.exists() else None

    def summary(self) -> Mapping[str, Any]:
        """Returns `summary.json`; empty if it is not finished."""
        return read_json(self.run_dir / SUMMARY_FILE) if self.status == "finished" and self.run_dir else {}

    def metric(self, name: str) -> float | None:
        """Returns a log key's last value in a finished run, from the summary or else from the log."""
        if self.status != "finished" or self.run_dir is None:
            return None
        value = self.summary().get(name)
        if value is None and (log := self.run_dir / METRICS_FILE).exists():
            lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
            value = next((line[name] for line in reversed(lines) if line.get(name) is not None), None)
        return None if value is None else float(value)

    def fail(self, code: int, log: Path, label: str = "") -> str:
        """Notes that the run's process ended badly, and returns why.

        Args:
            code: the process's exit code.
            log: what it printed.
            label: how the run is called there, if the process had several.
        """
        if code < 0:
            reason = f"killed by {signal.Signals(-code).name}"
            reason += " (out of memory?)" if code == -signal.SIGKILL else ""
        elif code == 0:
            reason = "its program ended well without a finished run (a folder with summary.json)"
        else:
            reason = f"{_last_words(log, label)} (exit code {code})"
        write_json(self._failure_file, {"code": code, "reason": reason})
        return reason


def _last_words(log: Path, label: str) -> str:
    """Returns what the log's end says of the run of that name, or the error in it, or its last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-50:]
    lines = [line.strip() for line in lines if line.strip()]
    own = [line.partition(": ")[2] for line in lines if label and line.startswith(f"{label}, ") and ": " in line]
    errors = [line for line in lines if re.match(r"(internal )?error: |\w*Error\b", line)]
    return (own or errors or lines or ["it said nothing"])[-1]
