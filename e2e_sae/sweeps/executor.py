"""Takes planned runs through their processes, some at a time."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from e2e_sae.interrupts import StopRequest
from e2e_sae.log import logger
from e2e_sae.settings import REPO_ROOT
from e2e_sae.sweeps.plan import Plan, PlannedRun
from e2e_sae.sweeps.report import describe, save_table
from e2e_sae.sweeps.run_folder import RunFolder

LOOK_EVERY_S = 0.1
"""Seconds between two looks at the processes."""


class Child(NamedTuple):
    """A run's process."""

    run: PlannedRun
    """What it trains."""
    folder: RunFolder
    """Where."""
    process: "subprocess.Popen[bytes]"
    """Leader of its own process group: a Ctrl-C in the terminal reaches the sweep alone, which passes it on."""
    slot: int
    """Which of the jobs it is."""
    started: float
    """When, on the performance counter."""


class Executor:
    """The state of a sweep in progress."""

    def __init__(self, sweep_dir: Path, plans: Sequence[Plan], n_jobs: int):
        """
        Args:
            sweep_dir: absolute.
            plans: their runs are taken in this order.
            n_jobs: processes at a time.
        """
        self.runs: list[PlannedRun] = []
        """Every run met so far."""
        self.n_done_before = 0
        """Runs that earlier calls had finished."""
        self._sweep_dir = sweep_dir
        self._todo = (run for plan in plans for run in plan.runs)
        self._n_total = sum(plan.n_runs for plan in plans)
        self._n_jobs = n_jobs
        self._free_slots = list(range(n_jobs))
        self._children: list[Child] = []
        self._gpus = visible_gpus()

    def run(self, stop: StopRequest, bar: Any) -> None:
        """Runs everything; once `stop` is set, ends what runs (it saves itself) and starts no more."""
        is_told, is_exhausted = False, False
        try:
            while self._children or not (stop or is_exhausted):
                self._reap(stop, bar)
                if stop and not is_told:
                    is_told = True
                    for child in self._children:
                        child.process.send_signal(signal.SIGTERM)
                while self._free_slots and not (stop or is_exhausted):
                    is_exhausted = not self._start_next(bar)
                time.sleep(LOOK_EVERY_S if self._children else 0)
        finally:  # a second Ctrl-C, or an error of ours: nothing is left behind
            for child in self._children:
                os.killpg(child.process.pid, signal.SIGKILL)
                child.process.wait()

    def _start_next(self, bar: Any) -> bool:
        """Starts the next run that is not finished; says whether there was one."""
        for run in self._todo:
            is_known = run.key in (other.key for other in self.runs)
            self.runs.append(run)
            folder = RunFolder.of(run, self._sweep_dir)
            if is_known or folder.status == "finished":
                self.n_done_before += not is_known
                bar.initial += 1  # not counted in the speed
                bar.update(1)
                continue
            self._start(run, folder)
            return True
        return False

    def _start(self, run: PlannedRun, folder: RunFolder) -> None:
        run_dir = folder.run_dir
        folder.prepare(run)
        slot = self._free_slots.pop(0)
        what = [str(folder.config_file)] if run_dir is None else ["--resume", str(run_dir)]
        command = [sys.executable, "-u", "-m", "e2e_sae.sweeps.child", str(os.getpid()), str(folder.path / ".lock")]
        with folder.log_file.open("ab") as log:
            process = subprocess.Popen(
                [*command, str(run.program), *what],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=child_environment(os.environ, slot, self._n_jobs, self._gpus, run.config.device),
                start_new_session=True,
            )
        self._children.append(Child(run, folder, process, slot, time.perf_counter()))
        verb = "starts" if run_dir is None else "goes on"
        logger.info(f"[{len(self.runs)}/{self._n_total}] {run.label}: {verb}; log: {folder.log_file}")

    def _reap(self, stop: StopRequest, bar: Any) -> None:
        """Takes in the processes that have ended."""
        for child in [c for c in self._children if c.process.poll() is not None]:
            self._children.remove(child)
            self._free_slots.append(child.slot)
            code = child.process.returncode
            if child.folder.status == "finished":
                result = describe(child.run, child.folder)
                logger.info(f"{result} ({time.perf_counter() - child.started:.0f} s)")
                bar.set_postfix_str(result, refresh=False)
            elif not (stop and code in (-signal.SIGTERM, 128 + signal.SIGTERM)):
                reason = child.folder.fail(code)
                logger.warning(f"{child.run.label} failed: {reason}")
            else:
                continue
            bar.update(1)
            save_table(self.runs, self._sweep_dir)


def visible_gpus() -> list[str]:
    """Returns the names under which CUDA_VISIBLE_DEVICES knows the GPUs that this process may use."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    import torch

    return [str(n) for n in range(torch.cuda.device_count())]


def child_environment(
    environment: Mapping[str, str], slot: int, n_jobs: int, gpus: Sequence[str], device: str
) -> dict[str, str]:
    """Returns the environment of a run's process: its share of the cores and, of several GPUs, the next in turn.

    Args:
        environment: the sweep's own; an OMP_NUM_THREADS in it stays.
        slot: which of the jobs it is.
        n_jobs: how many there are.
        gpus: those there are.
        device: the run's setting; one that names a GPU by number is left its choice.
    """
    child = {key: value for key, value in environment.items() if key != "WANDB_SWEEP_ID"}
    child["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO_ROOT), environment.get("PYTHONPATH")]))
    if n_jobs > 1:
        n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        child.setdefault("OMP_NUM_THREADS", str(max(1, n_cores // n_jobs)))
    if len(gpus) > 1 and device in ("auto", "cuda"):
        child["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return child
