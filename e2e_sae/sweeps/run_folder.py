"""What is on disk of one run of a sweep. Its state is read from here alone, so that a kill at any moment loses nothing.

<sweep folder>/runs/<sweep>_<values>_<key>/
  config.yaml      the run's settings
  console.log      what its process printed, all attempts
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
from e2e_sae.checkpoint.run_dir import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE
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

    def prepare(self, run: PlannedRun) -> None:
        """Makes it, with the config, and forgets an earlier failure."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config_file, run.config.model_copy(update={"save_dir": self.path}).to_yaml())
        self._failure_file.unlink(missing_ok=True)

    @property
    def config_file(self) -> Path:
        """`config.yaml`."""
        return self.path / "config.yaml"

    @property
    def log_file(self) -> Path:
        """`console.log`."""
        return self.path / "console.log"

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

    def fail(self, code: int) -> str:
        """Notes that the run's process ended badly, and returns why."""
        if code < 0:
            reason = f"killed by {signal.Signals(-code).name}"
            reason += " (out of memory?)" if code == -signal.SIGKILL else ""
        elif code == 0:
            reason = "its program ended well without a finished run (a folder with summary.json)"
        else:
            reason = f"{self._last_words()} (exit code {code})"
        write_json(self._failure_file, {"code": code, "reason": reason})
        return reason

    def _last_words(self) -> str:
        """Returns the error in the log's end, or its last line."""
        lines = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-50:]
        lines = [line.strip() for line in lines if line.strip()]
        errors = [line for line in lines if re.match(r"(internal )?error: |\w*Error\b", line)]
        return (errors or lines or ["it said nothing"])[-1]
