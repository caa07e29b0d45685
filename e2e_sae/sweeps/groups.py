"""Which runs of a sweep train together, over one clean pass (`--shared`): those that differ in nothing that members of
one run share, and that have come equally far."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from e2e_sae.group import SEED_OF_ROWS, shared_settings
from e2e_sae.log import logger
from e2e_sae.sweeps.plan import Plan, PlannedRun
from e2e_sae.sweeps.run_folder import RunFolder


class Numbered(NamedTuple):
    """A run and its place in the table."""

    number: tuple[int, int]
    """Of its plan, and of the run in it."""
    run: PlannedRun
    """The run."""


def single_runs(plans: Sequence[Plan]) -> Iterator[list[Numbered]]:
    """Yields every run in a group of its own; bayes makes each when it is asked for."""
    return ([numbered] for numbered in _numbered(enumerate(plans)))


def shared_groups(plans: Sequence[Plan], sweep_dir: Path, n_at_most: int) -> Iterator[list[Numbered]]:
    """Yields the runs in groups that can train together, across sweeps too.

    Runs of bayes stay alone: each is chosen by what the ones before have given. So do runs whose seeds bring the rows
    in another order.

    Args:
        plans: the sweeps.
        sweep_dir: tells how far each run is.
        n_at_most: runs in a group; 0: any number.
    """
    is_bayes = [plan.sweep.config.method == "bayes" for plan in plans]
    groups: dict[str, list[Numbered]] = {}
    orders: dict[str, set[str]] = {}
    known: set[str] = set()
    for numbered in _numbered((n, plan) for n, plan in enumerate(plans) if not is_bayes[n]):
        run, key = numbered.run, numbered.run.key
        folder = RunFolder.of(run, sweep_dir)
        if key not in known and folder.status != "finished":
            known.add(key)
            settings = shared_settings(run.config)
            unseeded = {k: v for k, v in settings.items() if not k.startswith(SEED_OF_ROWS)}
            key, but_for_seeds = (_text([s, str(run.program), folder.stage]) for s in (settings, unseeded))
            orders.setdefault(but_for_seeds, set()).add(key)
        groups.setdefault(key, []).append(numbered)
    if any(len(keys) > 1 for keys in orders.values()):
        logger.info(
            "note: runs whose seed brings the rows in another order do not train together; give train_data.seed (and "
            "eval_data.seed) in the base config to make them"
        )
    for group in groups.values():
        size = n_at_most or len(group)
        yield from (group[i : i + size] for i in range(0, len(group), size))
    yield from ([numbered] for numbered in _numbered((n, plan) for n, plan in enumerate(plans) if is_bayes[n]))


def _numbered(plans: Iterable[tuple[int, Plan]]) -> Iterator[Numbered]:
    return (Numbered((n, i), run) for n, plan in plans for i, run in enumerate(plan.runs))


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)
