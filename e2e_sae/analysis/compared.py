"""Which SAEs are compared on activations, and which of them share the clean ones.

All rows of the table of runs where they are few (`FEW`), else those that match at equal CE increase: one for each kind
and position, as the paper (arXiv 2405.12241, section 3) compares them. Transcoders are left out: what they read is not
what their output stands for.

Each SAE is looked at alone, on clean activations, also where its run has several.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from e2e_sae.analysis.item import NotApplicable
from e2e_sae.analysis.matching import in_order, matched
from e2e_sae.analysis.study import Study
from e2e_sae.log import logger
from e2e_sae.saes import SAE

FEW = 8
"""So many rows of the table are all compared: lines that can still be told apart in one figure."""
KEYS = ("model_name", "sae_pos", "id", "label", "run_type", "architecture")
"""Columns that say which SAE a row of a table is about; `label` is unique for each model and position."""


@dataclass(frozen=True)
class ComparedSAE:
    """One SAE under comparison."""

    keys: Mapping[str, str]
    """`KEYS` and their values."""
    fingerprint: str
    """Of its run's tensors."""

    @property
    def run_id(self) -> str:
        """Its run."""
        return self.keys["id"]

    @property
    def point(self) -> str:
        """The hook point where it reads and writes."""
        return self.keys["sae_pos"]


@dataclass(frozen=True)
class Group:
    """SAEs of one language model: they share clean activations."""

    saes: tuple[ComparedSAE, ...]
    """At least one. Token rows are those of the first one's run, in its order."""
    facts: Mapping[str, Any]
    """The language model, the data set and the fingerprints, for keys of the cache."""

    @property
    def run_id(self) -> str:
        """The run whose token rows are looked at."""
        return self.saes[0].run_id

    @property
    def model_name(self) -> str:
        """The language model, as the table has it."""
        return self.saes[0].keys["model_name"]

    @property
    def points(self) -> list[str]:
        """Hook points of the SAEs, each once."""
        return list(dict.fromkeys(sae.point for sae in self.saes))


def compared_groups(study: Study) -> list[Group]:
    """Returns the SAEs to compare.

    Raises:
        NotApplicable: there is none.
        UserError: a run has no config, or its language model is not to be had.
    """
    table = study.table if len(study.table) <= FEW else matched(study.table, by="CE")
    if not len(table):
        raise NotApplicable(f"it wants at most {FEW} rows in runs.csv, or CE_increase and L0 to choose from them")
    kinds = in_order(table["kind"])
    rows = [row for row in table.to_dict("records") if not _is_transcoder(study, row)]
    rows.sort(key=lambda row: kinds.index(row["kind"]))
    if not rows:
        raise NotApplicable("it wants SAEs that write where they read, and there are none among these runs")
    found: dict[str, list[ComparedSAE]] = {}
    for row, label in zip(rows, labels(rows), strict=True):
        lm = json.dumps(study.lm_key(study.stored(row["id"])))
        keys = {**{key: str(row[key]) for key in KEYS if key != "label"}, "label": label}
        found.setdefault(lm, []).append(ComparedSAE(keys, study.fingerprint(row["id"])))
    return [_group(study, saes) for saes in found.values()]


def _group(study: Study, saes: Sequence[ComparedSAE]) -> Group:
    facts = facts_of(study, saes[0].run_id)
    others = [sae.run_id for sae in saes if facts_of(study, sae.run_id) != facts]
    if others:
        logger.info(
            f"note: {', '.join(others)} were evaluated on other data than {saes[0].run_id}, whose rows are taken"
        )
    return Group(tuple(saes), {**facts, "saes": [[sae.point, sae.fingerprint] for sae in saes]})


def facts_of(study: Study, run_id: str) -> dict[str, Any]:
    """Returns the language model and the data set that a run's clean activations depend on, for keys of the cache.

    Raises:
        UserError: the run has no config.
    """
    run = study.stored(run_id)
    config = study.config(run)
    # Another seed is another order of the same rows.
    data = {**(config.eval_data or config.train_data).to_dict(), "seed": None}
    return {"lm": study.lm_key(run), "data": data}


def opened(study: Study, group: Group) -> list[SAE]:
    """Returns a group's SAEs on their language model's device, in eval mode."""
    models = {run_id: study.open(run_id) for run_id in dict.fromkeys(sae.run_id for sae in group.saes)}
    return [next(iter(models[sae.run_id].saes_at([sae.point]).values())) for sae in group.saes]


def labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns what to call each row of the table of runs: its kind, with its L0, seed or id where that is not enough
    to tell it from the others of its model and position."""
    tried = (
        lambda row: row["kind"],
        lambda row: f"{row['kind']}, L0 {row['L0']:.0f}",
        lambda row: f"{row['kind']}, L0 {row['L0']:.0f}, seed {row['seed']}",
        lambda row: f"{row['kind']}, {row['id']}",
    )
    made: list[str] = []
    for row in rows:
        place = [other for other in rows if all(other[key] == row[key] for key in ("model_name", "sae_pos"))]
        alike = [other for other in place if other["kind"] == row["kind"]]
        name = next((name for name in tried if len({name(other) for other in alike}) == len(alike)), tried[-1])
        made.append(str(name(row)))
    return made


def _is_transcoder(study: Study, row: Mapping[str, Any]) -> bool:
    position = study.stored(row["id"]).saes[row["sae_pos"]].info.position
    if position.is_transcoder:
        logger.info(f"{row['id']}: left out, it is a transcoder ({position})")
    return position.is_transcoder
