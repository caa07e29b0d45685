"""`e2e-sae sweep`: runs what is not finished of some sweep files, then the table and the figure."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from e2e_sae.checkpoint.files import make_out_folder, write_text
from e2e_sae.errors import Interrupted, RunFailed, UserError, did_you_mean
from e2e_sae.interrupts import stop_requests
from e2e_sae.log import logger
from e2e_sae.progress import progress_bar
from e2e_sae.sweeps.executor import Executor
from e2e_sae.sweeps.plan import Cost, Plan, PlannedRun, plan_sweep
from e2e_sae.sweeps.report import draw_pareto, note_missing, save_table, table_text
from e2e_sae.sweeps.run_folder import RunFolder
from e2e_sae.sweeps.sweep_file import Sweep, read_sweep


class SweepInterrupted(Interrupted):
    """A sweep that a signal stopped, after its runs had saved themselves."""

    def __init__(self, signum: int, command: str):
        """
        Args:
            signum: the signal.
            command: goes on with the sweep.
        """
        super().__init__(signum)
        self.command = command

    def __str__(self) -> str:
        return f"{super().__str__()}; go on with: {self.command}"


def run_sweeps(
    files: Sequence[str | Path],
    out: str | Path | None = None,
    jobs: int = 1,
    overrides: Sequence[str] = (),
    count: int | None = None,
    shared: int | None = None,
) -> Path:
    """Runs what is not finished of some sweeps and returns the sweep folder.

    Args:
        files: sweep files; their runs share one table and one figure.
        out: the sweep folder; None: `out/sweeps/<names of the files>`.
        jobs: runs at a time.
        overrides: `dotted.key=value` for every run.
        count: runs of each sweep at most.
        shared: runs that differ only in what members of one run may are trained together by one process, so many at
            most; 0: any number. None: every run has its own process.

    Raises:
        UserError: a file, an override or a run's settings are wrong; nothing has been started then.
        RunFailed: some runs failed; all others are finished.
        SweepInterrupted: a signal stopped it.
    """
    if jobs < 1 or (count is not None and count < 1):
        raise UserError(f"--jobs and --count must be at least 1 (given: {jobs if jobs < 1 else count})")
    if shared is not None and shared < 0:
        raise UserError(f"--shared must be at least 1, or without a number (given: {shared})")
    sweeps = [read_sweep(file, count) for file in files]
    names = [sweep.name for sweep in sweeps]
    if len(set(names)) < len(names):
        raise UserError(f"the sweep files of one call need different names (given: {', '.join(map(str, files))})")
    folder = Path("out/sweeps", "+".join(names)) if out is None else Path(out)
    sweep_dir = folder.resolve()
    plans = [plan_sweep(s, overrides, _cost_of(s, sweep_dir), sweep_dir / f"{s.name}.points.json") for s in sweeps]
    make_out_folder(folder)
    (sweep_dir / "runs").mkdir(exist_ok=True)
    with _locked(folder):
        for sweep in sweeps:
            write_text(sweep_dir / f"{sweep.name}.yaml", sweep.file.read_text(encoding="utf-8"))
        command = _command_line(files, out, jobs, overrides, count, shared)
        _execute(Executor(sweep_dir, plans, jobs, shared), plans, sweep_dir, jobs, command)
    return sweep_dir


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)  # the system frees it when its holder dies, however that comes about
    except Timeout:
        raise UserError(
            f"'{folder}' is in use: another `e2e-sae sweep` runs in it; wait for its end, or give another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _execute(executor: Executor, plans: Sequence[Plan], sweep_dir: Path, jobs: int, command: str) -> None:
    n_total = sum(plan.n_runs for plan in plans)
    logger.info(f"{n_total} runs, {jobs} at a time; sweep folder: {sweep_dir}")
    with stop_requests() as stop, progress_bar(total=n_total, desc="sweep", unit="run") as bar:
        executor.run(stop, bar)
    table, figure = save_table(executor.runs, sweep_dir), sweep_dir / "pareto.png"
    if stop.signum is not None:
        raise SweepInterrupted(stop.signum, command)
    logger.info(f"\n{table_text(table)}\n")
    note_missing(table)
    is_drawn = draw_pareto(table, figure)
    logger.info(f"table: {table}\nfigure: {figure if is_drawn else 'none, nothing has been evaluated'}")
    if executor.n_done_before:
        logger.info(f"{executor.n_done_before} of {n_total} runs had been finished before")
    folders = [(run.label, RunFolder.of(run, sweep_dir)) for run in executor.runs]
    failures = [f"{label}: {f.failure}; log: {f.log_file}" for label, f in folders if f.status == "failed"]
    if failures:
        listed = "\n  ".join(failures)
        raise RunFailed(f"{len(failures)} of {n_total} runs failed; to try them again: {command}\n  {listed}")


def _cost_of(sweep: Sweep, sweep_dir: Path) -> Cost:
    """Returns the function that tells bayes what a run has cost: one that failed, or whose metric is not finite or not
    there, as much as the worst so far."""
    metric = sweep.config.metric
    costs: list[float] = []
    lacking: set[str] = set()

    def cost(run: PlannedRun) -> float | None:
        assert metric is not None, "bayes has a metric"
        folder = RunFolder.of(run, sweep_dir)
        value = folder.metric(metric.name)
        if value is not None:
            costs.append(value if metric.goal == "minimize" else -value)
            return costs[-1]
        if folder.status == "finished" and run.key not in lacking:
            lacking.add(run.key)
            hint = did_you_mean(metric.name, folder.summary())
            logger.warning(f"{run.label}: has no finite '{metric.name}', counts as the worst of the runs.{hint}")
        return max(costs, default=None) if folder.status in ("failed", "finished") else None

    return cost


def _command_line(
    files: Sequence[str | Path],
    out: str | Path | None,
    jobs: int,
    overrides: Sequence[str],
    count: int | None,
    shared: int | None,
) -> str:
    parts = ["e2e-sae", "sweep", *map(str, files)]
    parts += [] if out is None else ["--out", str(out)]
    parts += [] if jobs == 1 else ["--jobs", str(jobs)]
    parts += [] if count is None else ["--count", str(count)]
    parts += [] if shared is None else ["--shared", *([str(shared)] if shared else [])]
    for override in overrides:
        parts += ["--set", override]
    return shlex.join(parts)
