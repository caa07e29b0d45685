"""The table of runs: one row for each run and position, settings beside final measurements.

Columns are those of the paper's library's analysis where it has them; layers are counted at `hook_resid_pre`: the
output of block i is layer i + 1. What was not logged is NaN.

    explained_var, explained_var_ln   the paper's (`metrics.legacy_explained_variances`), at the SAE relative to its
                                      output; `_ln`: both sides layer-normed
    quality_explained_var             1 - (sum of squared errors / variance of the clean activation)
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from e2e_sae.analysis.found_runs import FoundRun, find_runs
from e2e_sae.base_config import deep_update
from e2e_sae.errors import UserError, did_you_mean
from e2e_sae.hooks import block_of
from e2e_sae.losses import LossConfigs
from e2e_sae.run_types import run_type
from e2e_sae.saes import SAEConfig

_RESID = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
_RATIO = re.compile(r"(?:^|_)ratio-([\d.]+)")
_PER_LAYER = {
    "recon_loss": "loss/eval/in_to_orig/",
    "explained_var": "loss/eval/in_to_orig/explained_variance/",
    "explained_var_ln": "loss/eval/in_to_orig/explained_variance_ln/",
    "quality_explained_var": "quality/eval/explained_variance/",
}
"""Column -> how the log keys of the residual stream's hook points begin."""
_AT_SAE = {
    "out_to_in": "loss/eval/out_to_in/",
    "explained_var": "loss/eval/out_to_in/explained_variance/",
    "explained_var_ln": "loss/eval/out_to_in/explained_variance_ln/",
    "quality_explained_var": "quality/eval/explained_variance/",
}
_SAE_KEY = re.compile(r"sparsity/(?:eval/L_0|L_0_final|alive_dict_elements_final|alive_dict_elements)/(.+)")


def runs_table(sources: Sequence[str | Path]) -> Any:
    """Returns the pandas table of the finished runs at these places (`found_runs.py` says which places there are).

    Raises:
        UserError: a place is none, or has no finished run of SAEs.
        MissingFileError: there is no such place, or W&B cannot be reached.
    """
    import pandas as pd

    table = pd.DataFrame([row for run in find_runs(sources) for row in _rows(run)])
    columns = [str(column) for column in table]
    return table[sorted(columns, key=_layer_column)]


def only_where(table: Any, conditions: Sequence[str]) -> Any:
    """Returns the rows that meet all conditions; several of one column: any of them.

    Args:
        table: of runs.
        conditions: `column=value`, such as `architecture=relu`, `n_samples=3200`, `k=null`.

    Raises:
        UserError: a condition is malformed, there is no such column or value, or no row meets them all.
    """
    wanted: dict[str, list[str]] = {}
    for condition in conditions:
        column, equals, value = (part.strip() for part in condition.partition("="))
        if not equals or not column:
            raise UserError(f"--where '{condition}' is malformed: expected COLUMN=VALUE")
        if column not in table:
            raise UserError(f"the runs have no column '{column}'.{did_you_mean(column, map(str, table.columns))}")
        wanted.setdefault(column, []).append(value)
    kept = table
    for column, values in wanted.items():
        matches = [_equals(table[column], value) for value in values]
        for value, match in zip(values, matches, strict=True):
            if not match.any():
                there = ", ".join(dict.fromkeys(_shown(v) for v in table[column].unique()[:20]))
                raise UserError(f"no run has {column}={value}; there are: {there}")
        kept = kept[_any(matches)[kept.index]]
    if kept.empty:
        raise UserError(f"no run is left by {' and '.join(f'--where {c}' for c in conditions)}")
    return kept.reset_index(drop=True)


def layer_of(hook_name: str) -> int | None:
    """Returns which layer of the residual stream a hook point is; None: it is not in the stream, or in the middle of a
    block.

    >>> layer_of("blocks.3.hook_resid_pre"), layer_of("blocks.3.hook_resid_post"), layer_of("blocks.3.hook_mlp_out")
    (3, 4, None)
    """
    match = _RESID.fullmatch(hook_name)
    return None if match is None else int(match[1]) + (match[2] == "post")


def _rows(run: FoundRun) -> list[dict[str, Any]]:
    """Returns one row for each SAE of a run."""
    settings, metrics = _settings(run), run.metrics
    measured = {
        "CE_increase": _ce_increase(metrics),
        "kl": _number(metrics, "loss/eval/logits_kl"),
        "mean_grad_norm": run.mean_grad_norm,
        "seconds": _number(run.timing, "seconds"),
        "tokens_per_second": _number(run.timing, "tokens_per_second"),
        "members": _number(run.timing, "members"),
    }
    rows: list[dict[str, Any]] = []
    for name in _positions(run):
        block = block_of(name)
        place = {"sae_pos": name, "layer": math.nan if block is None else block}
        at_sae = {
            "L0": _number(metrics, f"sparsity/eval/L_0/{name}", f"sparsity/L_0_final/{name}"),
            "alive_dict_elements": _alive(metrics, name),
            **{column: _number(metrics, stem + name) for column, stem in _AT_SAE.items()},
        }
        head = {"id": run.id, "name": run.name, "source": run.source}
        rows.append({**head, **settings, **place, **_size(run, name), **at_sae, **measured, **_layers(metrics, name)})
    return rows


def _settings(run: FoundRun) -> dict[str, Any]:
    """Returns the columns that all SAEs of a run share."""
    config = run.config
    losses = _losses(config)
    first, last = (_run_type(losses[n]) for n in (0, -1))
    kind_of_run = last if first == last else f"{first} then {last}"
    sae = (config.get("saes") or {}).get("sae") or {}
    architecture = str(sae.get("architecture") or SAEConfig().architecture).rpartition(":")[-1]
    loss = losses[-1]
    return {
        "model_name": _model_name(config),
        "run_type": kind_of_run,
        "architecture": architecture,
        "kind": kind_of_run if architecture == SAEConfig().architecture else f"{architecture} {kind_of_run}",
        "seed": config.get("seed", 0),
        "n_samples": _number({"n": config.get("n_samples"), **run.metrics}, "n", "samples"),
        "n_tokens": _number(run.metrics, "total_tokens"),
        "lr": _number(config, "lr"),
        "k": _number({"k": sae.get("k"), "max_k": max(sae.get("ks") or [math.nan])}, "k", "max_k"),
        "sparsity_coeff": _at(loss, "sparsity", "coeff"),
        "target_l0": _at(loss, "sparsity", "target_l0"),
        "kl_coeff": _at(loss, "logits_kl", "coeff"),
        "in_to_orig_coeff": _at(loss, "in_to_orig", "total_coeff"),
        "out_to_in_coeff": _at(loss, "out_to_in", "coeff"),
    }


def _losses(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the loss settings of each phase. (Not through `Config`: old runs have keys that it refuses, and paths in
    it must exist.)"""
    loss = config.get("loss") or {}
    return [deep_update(loss, phase.get("loss") or {}) for phase in config.get("phases") or [{}]]


def _run_type(loss: Mapping[str, Any]) -> str:
    def coeff(*keys: str) -> float:
        value = _at(loss, *keys)
        return 0.0 if math.isnan(value) else value

    downstream = {"total_coeff": coeff("in_to_orig", "total_coeff"), "hook_positions": ["any"]}
    terms = {name: {"coeff": coeff(name, "coeff")} for name in ("logits_kl", "out_to_in")}
    return run_type(LossConfigs.from_dict({"in_to_orig": downstream, **terms}))


def _model_name(config: Mapping[str, Any]) -> str | None:
    """Returns what the language model is called: its hub name, or the last part of its path; with its revision."""
    name, path = config.get("tlens_model_name"), config.get("tlens_model_path")
    if not name and path:
        name = f"{Path(path).parent.name}/{Path(path).stem}" if Path(path).suffix else Path(path).name
    revision = config.get("tlens_model_revision") or config.get("tlens_model_checkpoint")
    return f"{name}@{revision}" if name and revision is not None else name


def _positions(run: FoundRun) -> list[str]:
    """Returns the names of the hook points that a run's SAEs write: from its checkpoint, its log, or its config."""
    logged = dict.fromkeys(match[1] for key in run.metrics if (match := _SAE_KEY.fullmatch(key)))
    if run.d_saes or logged:
        return list(run.d_saes or logged)
    positions = run.config["saes"].get("sae_positions") or []
    named = [positions] if isinstance(positions, str) else positions
    return [p["write"] if isinstance(p, Mapping) else str(p) for p in named]


def _size(run: FoundRun, name: str) -> dict[str, float]:
    """Returns d_sae and ratio of one SAE."""
    saes = run.config["saes"]
    d_sae, ratio = (_of_position(saes.get(key), name) for key in ("d_sae", "dict_size_to_input_ratio"))
    if name in run.d_saes:
        d_in, d_sae = run.d_saes[name]
        ratio = d_sae / d_in if math.isnan(ratio) else ratio
    elif math.isnan(ratio) and (match := _RATIO.search(run.name)):
        ratio = float(match[1])  # some published runs say it nowhere else
    return {"ratio": ratio, "d_sae": d_sae}


def _of_position(value: Any, name: str) -> float:
    return _number(value, name) if isinstance(value, Mapping) else _number({name: value}, name)


def _ce_increase(metrics: Mapping[str, Any]) -> float:
    increase = _number(metrics, "performance/eval/ce_increase")
    return -_number(metrics, "performance/eval/difference_ce_loss") if math.isnan(increase) else increase


def _alive(metrics: Mapping[str, Any], name: str) -> float:
    """Returns how many latents were active at least once: at the end of our runs on their evaluation data, in the
    paper's library's runs in their last window of training, as in the paper."""
    stem = "sparsity/alive_dict_elements"
    keys = [f"{stem}_final/{name}", f"sparsity/eval/alive_dict_elements/{name}", f"{stem}/{name}"]
    is_ours = "performance/eval/ce_increase" in metrics or "firing_data" in metrics
    return _number(metrics, *(keys if is_ours else reversed(keys)))


def _layers(metrics: Mapping[str, Any], sae_pos: str) -> dict[str, float]:
    """Returns the measurements of each layer from the SAE's own on."""
    own = layer_of(sae_pos)
    block = block_of(sae_pos)
    first = own if own is not None else 0 if block is None else block + 1
    columns: dict[str, float] = {}
    for measure, stem in _PER_LAYER.items():
        for key in metrics:
            layer = layer_of(key.removeprefix(stem)) if key.startswith(stem) else None
            if layer is not None and layer >= first:
                columns[f"{measure}_layer-{layer}"] = _number(metrics, key)
    if own is not None:  # where the SAE is, the stream is compared before it, and equal
        for measure, stem in {**_AT_SAE, "recon_loss": _AT_SAE["out_to_in"]}.items():
            columns[f"{measure}_layer-{own}"] = _number(metrics, stem + sae_pos)
        del columns[f"out_to_in_layer-{own}"]
    return columns


def _layer_column(column: str) -> tuple[str, int]:
    """Returns what columns are sorted by: those of layers come last, each measure's in the order of the layers."""
    measure, separator, layer = column.rpartition("_layer-")
    return (measure, int(layer)) if separator else ("", 0)


def _number(values: Mapping[str, Any], *keys: str) -> float:
    """Returns the first of these values that is a number; NaN without one. (W&B sends NaN as text.)"""
    for key in keys:
        value = values.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value):
            return float(value)
    return math.nan


def _at(values: Mapping[str, Any], *keys: str) -> float:
    holder: Any = values
    for key in keys[:-1]:
        holder = holder.get(key) or {}
    return _number(holder, keys[-1])


def _equals(column: Any, value: str) -> Any:
    if value in ("null", "None", "NaN", "nan", ""):
        return column.isna()
    if column.dtype.kind in "fiu":
        try:
            return column == float(value)
        except ValueError:
            raise UserError(f"--where {column.name}={value}: the column holds numbers") from None
    return column.astype(str) == value


def _any(matches: Sequence[Any]) -> Any:
    total = matches[0]
    for match in matches[1:]:
        total = total | match
    return total


def _shown(value: Any) -> str:
    if value is None or value != value:
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value)
