"""`e2e-sae pages`: a page for each latent of an SAE, and an index, as files that open without a server.

    DIR/index.html            the index: search, sorting; of several SAEs, what leads to theirs
    DIR/latents/12.html       the page of latent 12
    DIR/A-<position>/...      the same for each of several SAEs: A is the first run, B the one it is compared with

Two passes over the data: one counts and chooses the places to show (`feature_data.py`), one looks at what is around
them and runs the model again without each latent (`feature_effects.py`). What they find is kept in DIR/cache: what
was killed goes on where it was, and has no index before it is done.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from e2e_sae.acts import Position
from e2e_sae.analysis.activities import activities, data_key
from e2e_sae.analysis.feature_data import Activity, Rows
from e2e_sae.analysis.feature_effects import look_closely
from e2e_sae.analysis.feature_html import Features, Other, feature_page, index_page, overview_page, page_name
from e2e_sae.analysis.feature_lens import has_lens, logit_lens, written_directions
from e2e_sae.analysis.similarity import Neighbours, nearest, unit_directions
from e2e_sae.analysis.study import Study, digest_of
from e2e_sae.analysis.vocabulary import vocabulary
from e2e_sae.base_config import apply_overrides
from e2e_sae.checkpoint.files import check_is_free
from e2e_sae.checkpoint.records import StoredRun
from e2e_sae.config import Config, rename_old_keys
from e2e_sae.errors import MissingFileError, RunFailed, UserError
from e2e_sae.hooks import sae_key
from e2e_sae.log import logger
from e2e_sae.models.runner import SAEsAt
from e2e_sae.models.sae_transformer import SAETransformer
from e2e_sae.progress import progress_bar
from e2e_sae.saes import SAE

INDEX = "index.html"
"""What is opened first; written last."""
N_NEAREST = 8
"""Nearest latents shown of an SAE."""


class PageStudy(Study):
    """Runs that need no training config: of a SAELens folder or a lone `.pt`, `--set eval_data...` says which data."""

    def stored(self, run_id: str) -> StoredRun:
        """Returns a run as it is stored.

        Raises:
            MissingFileError: there is nothing of that name.
        """
        source = self.sources[run_id]
        try:
            return super().stored(run_id)
        except (UserError, RunFailed) as error:
            if Path(source).exists():
                raise
            raise MissingFileError(
                f"'{source}' is neither a file or folder nor a W&B run that can be had: {error}"
            ) from None

    def config(self, run: StoredRun) -> Config:
        """Returns a run's config with the overrides; what is only for training is made up where it has none."""
        values = rename_old_keys(run.config)
        if "train_data" in values:
            return super().config(run)
        saes = {"sae_positions": list(run.saes), "dict_size_to_input_ratio": 1.0}
        training = {"saes": saes, "batch_size": 1, "lr": 1.0, "loss": {"sparsity": {"coeff": 0.0}}}
        if any(override.startswith("tlens_model_path=") for override in self._overrides):
            values.pop("tlens_model_name", None)
        values = apply_overrides({**training, **values}, self._overrides)
        data = values.get("eval_data") or values.get("train_data")
        if not data:
            raise UserError(
                f"'{run.source}' does not say which data to look at: give --set eval_data.dataset_name=... and "
                "--set eval_data.n_ctx=..."
            )
        return Config.from_dict({"train_data": data, **values}, base_dir=run.source.parent)


class _Looked(NamedTuple):
    """One SAE after the first pass."""

    run_id: str
    """Its run."""
    label: str
    """What it is called beside others; empty if it is alone."""
    run: str
    """What the run is called."""
    position: Position
    """Where it sits."""
    sae: SAE
    """It."""
    lm: nn.Module
    """Its language model."""
    activity: Activity
    """What its latents do."""
    rows: Rows
    """The run's data."""
    texts: Sequence[str]
    """Of tokens, by id."""

    @property
    def directions(self) -> Float[Tensor, "d_sae d_out"]:
        """Decoder directions of norm 1, on the CPU."""
        return unit_directions(self.sae.W_dec.detach()).cpu()


class Shown(NamedTuple):
    """An SAE whose pages can be written."""

    features: Features
    """What is on them."""
    other: Other | None
    """The SAE that it is compared with."""
    texts: Sequence[str]
    """Of tokens, by id."""


def make_pages(study: PageStudy, out: Path, latents: Sequence[int] | None = None, top: int | None = None) -> int:
    """Writes pages for the study's runs, one or two that are compared, and returns how many there are.

    Args:
        study: the runs.
        out: a new or empty folder, or one that an earlier time did not finish.
        latents: of the first run, those that get a page; of the other one it is then those nearest to them.
        top: so many of each SAE, with the largest sums of activations; None: all that are ever active.

    Raises:
        UserError: the folder is not empty, a latent does not exist, or the runs' SAEs cannot be compared.
    """
    if (out / INDEX).exists() or not study.cache.is_dir():
        check_is_free(out)
    models = {run_id: study.open(run_id) for run_id in study.sources}
    pairs = _pairs([model.saes_at() for model in models.values()])
    if latents is not None:
        _check_exist(latents, [next(iter(models.values())).saes_at()[pair[0]] for pair in pairs])
    looked = [
        _look(study, run_id, models[run_id], [pair[n] for pair in pairs]) for n, run_id in enumerate(study.sources)
    ]
    shown: list[Shown] = []
    for pair in zip(*looked, strict=True):
        features = [_features(study, one, which) for one, which in zip(pair, _chosen(pair, latents, top), strict=True)]
        others = _others(pair, features) if len(pair) > 1 else [None]
        for one, each, other in zip(pair, features, others, strict=True):
            shown.append(Shown(each, other, one.texts))
    return write_pages(out, shown)


def _pairs(saes: Sequence[SAEsAt]) -> list[tuple[Position, ...]]:
    """Returns the positions that are looked at: of one run all of them; of two, pairs that can be compared."""
    first = list(saes[0])
    if len(saes) == 1:
        return [(position,) for position in first]
    second = {position.name: position for position in saes[1]}
    pairs = [(position, second[position.name]) for position in first if position.name in second]
    if not pairs and len(first) == len(second) == 1:
        pairs = list(zip(first, second.values(), strict=True))
    places = [", ".join(map(str, theirs)) for theirs in saes]
    if not pairs:
        raise UserError(f"the runs have no position in common: SAEs are at {places[0]}, and at {places[1]}")
    for a, b in pairs:
        widths = saes[0][a].d_out, saes[1][b].d_out
        if widths[0] != widths[1]:
            raise UserError(
                f"SAEs that write {widths[0]} and {widths[1]} dimensions ({a}, {b}) cannot be compared: choose another "
                "run for --other"
            )
    return pairs


def _check_exist(latents: Sequence[int], saes: Sequence[SAE]) -> None:
    n = min(sae.d_sae for sae in saes)
    unknown = [latent for latent in latents if not 0 <= latent < n]
    if unknown:
        raise UserError(f"there is no latent {unknown[0]}: the SAE has {n}, from 0 to {n - 1}")


def _look(study: PageStudy, run_id: str, model: SAETransformer, positions: Sequence[Position]) -> list[_Looked]:
    """Makes the first pass over a run's data."""
    start, lm = time.monotonic(), model.tlens_model
    saes = {position: model.saes_at()[position] for position in positions}
    found, rows = activities(study, run_id, [position.name for position in positions])
    run = study.stored(run_id)
    name, config = _run_name(run), study.config(run)
    texts = vocabulary(lm, (config.eval_data or config.train_data).tokenizer_name)
    looked: list[_Looked] = []
    for n, (position, sae) in enumerate(saes.items(), start=1):
        label = "" if len(study.sources) * len(saes) == 1 else f"{run_id}{n if len(saes) > 1 else ''}"
        activity = found[position.name]
        looked.append(_Looked(run_id, label, name, position, sae, lm, activity, rows, texts))
        logger.info(
            f"{label or name}: {int((activity.n_active > 0).sum()):,} of {sae.d_sae:,} latents active in "
            f"{activity.n_tokens:,} tokens, L0 {activity.l0:.1f} ({time.monotonic() - start:.0f} s)"
        )
    return looked


def _run_name(run: StoredRun) -> str:
    return run.source.parent.name if run.source.name.startswith("samples_") else run.source.stem


def _chosen(pair: Sequence[_Looked], latents: Sequence[int] | None, top: int | None) -> list[Int[Tensor, " N"]]:
    """Returns the latents of each SAE that get a page."""
    if latents is None:
        return [torch.tensor(one.activity.most_active(top or one.sae.d_sae), dtype=torch.int64) for one in pair]
    chosen = [torch.tensor(sorted(set(latents)), dtype=torch.int64)]
    for other in pair[1:]:
        chosen.append(nearest(pair[0].directions[chosen[0]], other.directions, N_NEAREST).indices.unique())
    return chosen


def _features(study: PageStudy, one: _Looked, latents: Int[Tensor, " N"]) -> Features:
    """Makes the second pass, over the rows that the pages show, and finds what the weights alone tell."""
    start, activity = time.monotonic(), one.activity
    places = torch.cat([activity.top[latents], activity.sample[latents]], 1)
    key = {
        **data_key(study, one.run_id, one.position.name),
        "places": digest_of({"latents": latents, "places": places, **vars(one.rows)}),
    }

    def kept(part: int, compute: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        return study.cached("closely", {**key, "part": part}, compute)

    contexts, effects = look_closely(
        one.lm, one.position, one.sae, one.rows, latents, places, study.batch_size, kept=kept
    )
    written, lens = written_directions(one.sae)[latents.to(one.sae.device)], None
    if has_lens(one.position.write) and len(latents):
        lens = logit_lens(one.lm, written)
    seconds = time.monotonic() - start
    logger.info(f"{one.label or one.run}: {len(latents):,} latents looked at closely ({seconds:.0f} s)")
    return Features(
        label=one.label,
        folder=f"{one.label}-{sae_key(one.position.name)}" if one.label else "",
        run=one.run,
        architecture=one.sae.architecture,
        position=one.position,
        activity=activity,
        latents=latents,
        contexts=contexts,
        effects=effects,
        lens=lens,
        here=nearest_others_of(one.directions, latents) if one.sae.d_sae > 1 else None,
    )


def nearest_others_of(directions: Float[Tensor, "d_sae d"], latents: Int[Tensor, " N"]) -> Neighbours:
    """Returns the latents nearest to some, other than they themselves."""
    found = nearest(directions[latents], directions, N_NEAREST + 1)
    is_same = found.indices == latents[:, None]
    order = is_same.int().argsort(dim=1, stable=True)[:, : found.indices.shape[1] - 1]  # they themselves come last
    return Neighbours(found.cosines.gather(1, order), found.indices.gather(1, order))


def _others(pair: Sequence[_Looked], features: Sequence[Features]) -> list[Other]:
    """Returns for each SAE of a pair what the other one has that is near."""
    return [
        Other(theirs, nearest(one.directions[ours.latents], other.directions, N_NEAREST))
        for one, ours, other, theirs in zip(pair, features, reversed(pair), reversed(features), strict=True)
    ]


def write_pages(out: Path, shown: Sequence[Shown]) -> int:
    """Writes all pages, those first that others lead to, and returns their number."""
    start, n = time.monotonic(), sum(len(one.features.latents) for one in shown)
    everything = [one.features for one in shown]
    with progress_bar(total=n, desc="pages") as bar:
        for features, other, texts in shown:
            folder = out / features.folder
            (folder / "latents").mkdir(parents=True, exist_ok=True)
            for page, latent in enumerate(features.latents.tolist()):
                _save(folder / page_name(latent), feature_page(features, page, texts, other))
                bar.update()
            _save(folder / INDEX, index_page(features, texts, other, everything))
    if len(shown) > 1:
        _save(out / INDEX, overview_page(everything, [one.other for one in shown]))
    n_bytes = sum(file.stat().st_size for file in out.rglob("*.html"))
    seconds = time.monotonic() - start
    logger.info(f"{n:,} pages, {n_bytes / 1e6:.1f} MB ({seconds:.0f} s): open {out / INDEX}")
    return n


def _save(file: Path, text: str) -> None:
    # Line ends as they are: the hashes of style and script are of the text.
    file.write_text(text, encoding="utf-8", newline="\n")
