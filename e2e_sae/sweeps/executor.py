"""Takes planned runs through their processes, some at a time."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from e2e_sae.checkpoint.files import write_text
from e2e_sae.group import group_config
from e2e_sae.interrupts import StopRequest
from e2e_sae.log import logger
from e2e_sae.settings import REPO_ROOT
from e2e_sae.sweeps.groups import Numbered, shared_groups, single_runs
from e2e_sae.sweeps.plan import Plan, PlannedRun
from e2e_sae.sweeps.report import describe, save_table
from e2e_sae.sweeps.run_folder import RunFolder

LOOK_EVERY_S = 0.1
"""Seconds between two looks at the processes."""


class Child(NamedTuple):
    """The process of a run, or of several that train together."""

    runs: list[PlannedRun]
    """What it trains."""
    folders: list[RunFolder]
    """Where; the first one has the log."""
    process: "subprocess.Popen[bytes]"
    """Leader of its own process group: a Ctrl-C in the terminal reaches the sweep alone, which passes it on."""
    slot: int
    """Which of the jobs it is."""
    started: float
    """When, on the performance counter."""


class Executor:
    """The state of a sweep in progress."""

    def __init__(self, sweep_dir: Path, plans: Sequence[Plan], n_jobs: int, shared: int | None = None):
        """
        Args:
            sweep_dir: absolute.
            plans: their runs are taken in this order.
            n_jobs: processes at a time.
            shared: runs that one process trains together at most; 0: any number; None: each has its own.
        """
        self.n_done_before = 0
        """Runs that earlier calls had finished."""
        self._met: list[Numbered] = []
        self._sweep_dir = sweep_dir
        self._todo = single_runs(plans) if shared is None else shared_groups(plans, sweep_dir, shared)
        self._n_total = sum(plan.n_runs for plan in plans)
        self._n_jobs = n_jobs
        self._free_slots = list(range(n_jobs))
        self._children: list[Child] = []
        self._gpus = visible_gpus()

    @property
    def runs(self) -> list[PlannedRun]:
        """Every run met so far, in the order of the plans."""
        return [met.run for met in sorted(self._met, key=lambda met: met.number)]

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
        """Starts the next group of which not all is finished; says whether there was one."""
        for group in self._todo:
            unfinished = [numbered.run for numbered in group if self._is_to_do(numbered, bar)]
            if unfinished:
                self._start(unfinished)
                return True
        return False

    def _is_to_do(self, numbered: Numbered, bar: Any) -> bool:
        """Meets a run and says whether it is to be trained now."""
        is_known = numbered.run.key in (met.run.key for met in self._met)
        self._met.append(numbered)
        if not is_known and RunFolder.of(numbered.run, self._sweep_dir).status != "finished":
            return True
        self.n_done_before += not is_known
        bar.initial += 1  # not counted in the speed
        bar.update(1)
        return False

    def _start(self, runs: list[PlannedRun]) -> None:
        folders = [RunFolder.of(run, self._sweep_dir) for run in runs]
        run_dirs = [folder.run_dir for folder in folders]
        configs = [folder.prepare(run) for folder, run in zip(folders, runs, strict=True)]
        first = folders[0]
        what = ["--resume", *map(str, run_dirs)] if run_dirs[0] is not None else [str(first.config_file)]
        if len(runs) > 1 and run_dirs[0] is None:
            write_text(first.group_file, group_config(configs).to_yaml())
            what = [str(first.group_file)]
        for other in folders[1:]:
            with other.log_file.open("a", encoding="utf-8") as log:
                log.write(f"trained together with others: see {first.log_file}\n")
        slot = self._free_slots.pop(0)
        locks = [str(folder.path / ".lock") for folder in folders]
        command = [sys.executable, "-u", "-m", "e2e_sae.sweeps.child", str(os.getpid()), str(len(locks)), *locks]
        with first.log_file.open("ab") as log:
            process = subprocess.Popen(
                [*command, str(runs[0].program), *what],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=child_environment(os.environ, slot, self._n_jobs, self._gpus, configs[0].device),
                start_new_session=True,
            )
        self._children.append(Child(runs, folders, process, slot, time.perf_counter()))
        verb = "starts" if run_dirs[0] is None else "goes on"
        names = "; ".join(run.label for run in runs) + (" (together)" if len(runs) > 1 else "")
        logger.info(f"[{len(self._met)}/{self._n_total}] {names}: {verb}; log: {first.log_file}")

    def _reap(self, stop: StopRequest, bar: Any) -> None:
        """Takes in the processes that have ended."""
        for child in [c for c in self._children if c.process.poll() is not None]:
            self._children.remove(child)
            self._free_slots.append(child.slot)
            is_stopped = bool(stop) and child.process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM)
            ended = [self._take_in(child, n, is_stopped, bar) for n in range(len(child.runs))]
            bar.update(sum(ended))
            if any(ended):
                save_table(self.runs, self._sweep_dir)

    def _take_in(self, child: Child, n: int, is_stopped: bool, bar: Any) -> bool:
        """Says how a process left its n-th run; returns False if it was interrupted."""
        run, folder = child.runs[n], child.folders[n]
        if folder.status == "finished":
            result = describe(run, folder)
            logger.info(f"{result} ({time.perf_counter() - child.started:.0f} s)")
            bar.set_postfix_str(result, refresh=False)
            return True
        if is_stopped:
            return False
        label = f"member {n + 1} of {len(child.runs)}" if len(child.runs) > 1 else ""
        reason = folder.fail(child.process.returncode, child.folders[0].log_file, label)
        logger.warning(f"{run.label} failed: {reason}")
        return True


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
