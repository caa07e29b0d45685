"""Seconds of a step: ours beside the twin, or several members beside one, alternating in one process."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from e2e_sae.base_config import apply_overrides

from .floor import Products, matmul_rate, peak_rate, step_work, synchronize
from .memory import peak_of
from .plain import plain_step
from .shapes import Kind, Shape, model_folder
from .steps import N_WARM_UP, Step, our_step


class Case(NamedTuple):
    """What is measured: one line of the table."""

    shape: Shape
    kind: Kind
    n_members: int = 1
    """More than one: beside one member, instead of beside the twin."""


class Settings(NamedTuple):
    """How it is measured."""

    device: str = "cpu"
    n_rounds: int = 7
    """How often each step is timed."""
    n_steps: int = 1
    """Steps of one timing: on a GPU several, which is told the next while it works on one."""
    overrides: Sequence[str] = ()
    """Settings of our runs, such as `autocast=bfloat16`; the twin stays in float32."""
    twin_rows: int | None = None
    """Rows of the twin's steps where memory does not suffice for ours'; None: as many, 0: no twin."""
    with_memory: bool = False
    """Also the peak memory of each, in processes of their own."""

    @property
    def products(self) -> Products:
        """Type of our matrix products."""
        values = apply_overrides({}, self.overrides)
        if values.get("autocast") is not None or values.get("dtype") == "bfloat16":
            return "bfloat16"
        if values.get("dtype") == "float64":
            return "float64"
        return "tf32" if values.get("tf32") else "float32"


def measure(case: Case, settings: Settings) -> dict[str, Any]:
    """Returns medians, ratios, the share of the arithmetic floor and, if asked, memory of one case."""
    with model_folder(case.shape) as shape:
        case = case._replace(shape=shape)
        memory = _memory(case, settings) if settings.with_memory else {}
        rounds, rates = _alternate(case, settings)
    medians = {name: statistics.median(seconds) for name, seconds in rounds.items()}
    work = step_work(case.shape, case.kind)
    operations, rate = work.of(case.n_members), statistics.median(rates)
    result: dict[str, Any] = {
        "shape": case.shape._replace(folder=None).to_dict(),
        "kind": case.kind,
        "members": case.n_members,
        "seconds": medians,
        "tokens_per_s": case.shape.n_tokens / medians["ours"],
        "floor_seconds": operations / rate,
        "share_of_floor": operations / rate / medians["ours"],
        "gflops": rate / 1e9,
        "rounds": rounds,
        **({"memory": memory} if memory else {}),
    }
    # Of each round, so that what else the machine does hits both.
    for name, key in (("twin", "ratio"), ("twin_without_metrics", "ratio_without_metrics")):
        if name in rounds:
            result[key] = statistics.median(t / o for t, o in zip(rounds[name], rounds["ours"], strict=True))
    if "one" in rounds:
        times = statistics.median(o / one for o, one in zip(rounds["ours"], rounds["one"], strict=True))
        result |= {"times_one": times, "floor_times_one": operations / work.of(1)}
    if settings.device.startswith("cuda"):
        result["share_of_peak"] = (
            operations / medians["ours"] / peak_rate(torch.device(settings.device), settings.products)
        )
    return result


def _memory(case: Case, settings: Settings) -> dict[str, Any]:
    """Returns the memory of each step by name."""
    asked = {"ours": ("ours", case.n_members)}
    if case.n_members > 1:
        asked["one"] = ("ours", 1)
    elif settings.twin_rows is None:
        asked["twin"] = ("twin", 1)
    return {
        name: peak_of(
            case.shape, case.kind, which, settings.device, n, settings.overrides if which == "ours" else ()
        )._asdict()
        for name, (which, n) in asked.items()
    }


def _alternate(case: Case, settings: Settings) -> tuple[dict[str, list[float]], list[float]]:
    """Returns the seconds of every step in every round, and the rates of matrix products measured in between."""
    shape, device = case.shape, torch.device(settings.device)
    scale = 1.0
    with tempfile.TemporaryDirectory() as folder:
        ours, lm = our_step(shape, case.kind, Path(folder), settings.device, case.n_members, settings.overrides)
        steps: dict[str, Step] = {"ours": ours}
        if case.n_members > 1:
            steps["one"] = our_step(shape, case.kind, Path(folder), settings.device, 1, settings.overrides)[0]
        elif settings.twin_rows != 0:
            theirs = shape._replace(batch_size=settings.twin_rows or shape.batch_size)
            scale = shape.batch_size / theirs.batch_size
            steps["twin"] = plain_step(lm, theirs, case.kind)
            steps["twin_without_metrics"] = plain_step(lm, theirs, case.kind, with_metrics=False)
        rounds: dict[str, list[float]] = {name: [] for name in steps}
        rates: list[float] = []
        for i in range(N_WARM_UP + settings.n_rounds):
            for name, step in steps.items():
                seconds = timed(step, device, settings.n_steps)
                if i >= N_WARM_UP:
                    rounds[name].append(seconds * (scale if name.startswith("twin") else 1.0))
            if i >= N_WARM_UP:
                rates.append(matmul_rate(shape, device, settings.products))
    return rounds, rates


def timed(step: Step, device: torch.device, n_steps: int = 1) -> float:
    """Returns the seconds that a step takes, the mean of `n_steps`."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(n_steps):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / n_steps
