"""`e2e-sae interpret`: explanations and scores of latents of SAEs, and how the SAEs compare.

DIR/explanations.jsonl   one line a latent: its explanation, and the contexts it was made from
DIR/scores.csv           one line a latent and score
DIR/differences.csv      of mean scores, where there are several SAEs; .md and .tex: the paper's Table 4
DIR/scores.png .svg      the paper's Fig. 9
DIR/summary.md           all of it in short
DIR/answers/             every answer of a language model (`answers.py`)
DIR/cache/               examples of latents
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from e2e_sae.analysis.compared import labels
from e2e_sae.analysis.interpret.answers import Asked, Estimate, Source, StoredAnswers
from e2e_sae.analysis.interpret.client import Endpoint, Stopped
from e2e_sae.analysis.interpret.examples import LatentExamples, Wanted, collect_examples
from e2e_sae.analysis.interpret.judge import Judge
from e2e_sae.analysis.interpret.parallel import in_threads
from e2e_sae.analysis.interpret.report import Interpretation, StudiedLatent, write_results
from e2e_sae.analysis.interpret.token_statistics import NAME, SCORER, token_explanation, token_scores
from e2e_sae.analysis.study import Study
from e2e_sae.checkpoint.files import make_out_folder
from e2e_sae.errors import Interrupted
from e2e_sae.interrupts import stop_requests
from e2e_sae.log import logger
from e2e_sae.progress import progress_bar


class Prices(NamedTuple):
    """What an endpoint charges, in dollars per million tokens."""

    tokens_in: float
    tokens_out: float


@dataclass(frozen=True)
class Online:
    """Language models, and how they may be asked."""

    judge: Judge
    endpoint: Endpoint
    concurrency: int = 8
    """Requests under way at a time."""
    prices: dict[str, Prices] | None = None
    """By model; None: not known."""
    confirm: Callable[[], bool] = lambda: True
    """Asks whether the estimated requests may be sent."""


def interpret(study: Study, wanted: Wanted, out: Path, online: Online | None) -> list[Path]:
    """Explains and scores latents of every SAE of a study, and returns the files of the results.

    Args:
        study: the SAEs, one for each row of its table.
        wanted: which latents, and how many examples.
        out: folder of the results; made if it is not there.
        online: language models; None: token statistics, without any.

    Returns:
        Files; none if the requests were not confirmed.

    Raises:
        UserError: latents, data or a tokenizer are missing, or the endpoint refuses what it is asked.
        RunFailed: the endpoint does not answer.
        Interrupted: by a signal; what was answered is kept.
    """
    make_out_folder(out)
    latents = _studied(study, wanted)
    if online is None:
        explainer, scored_by = NAME, SCORER
        found = [_by_tokens(studied) for studied in latents]
    else:
        explainer, scored_by = online.judge.explainer, online.judge.scorer
        answers = StoredAnswers(out / "answers")
        estimate = _estimate(online.judge, latents, answers)
        for line in estimate_lines(estimate, online):
            logger.info(line)
        if estimate.n_asked and not online.confirm():
            logger.info("nothing was asked")
            return []
        found = _judged(online, latents, answers, estimate)
    return write_results(found, explainer, scored_by, out, study.seed)


def estimate_lines(estimate: Estimate, online: Online) -> list[str]:
    """Returns what asking will take, for the user: requests, tokens, and the price if it is known."""
    n = sum(estimate.n_asked.values())
    lines = [f"{online.endpoint.url}: {n} requests to send, {estimate.n_recalled} answered already"]
    total = 0.0
    for model, n_requests in estimate.n_asked.items():
        n_in, n_out = estimate.n_in[model], estimate.n_out[model]
        line = f"  {model}: {n_requests} requests, about {n_in} tokens in and {n_out} out"
        if online.prices is not None:
            price = (n_in * online.prices[model].tokens_in + n_out * online.prices[model].tokens_out) / 1e6
            total += price
            line += f", about ${price:.2f}"
        lines.append(line)
    if online.prices is not None and len(estimate.n_asked) > 1:
        lines.append(f"  together about ${total:.2f}")
    return lines


def _studied(study: Study, wanted: Wanted) -> list[StudiedLatent]:
    rows = study.table.to_dict("records")
    several_places = len({(row["model_name"], row["sae_pos"]) for row in rows}) > 1
    latents: list[StudiedLatent] = []
    for row, label in zip(rows, labels(rows), strict=True):
        name = f"{label}, {row['sae_pos']}" if several_places else label
        columns = {key: row[key] for key in ("model_name", "sae_pos", "id", "run_type")}
        found = collect_examples(study, row["id"], row["sae_pos"], wanted)
        logger.info(f"{name}: {len(found)} latents")
        latents += [StudiedLatent({"label": name, **columns}, examples) for examples in found]
    return latents


def _by_tokens(studied: StudiedLatent) -> Interpretation:
    if not _can_be_tested(studied.examples):
        return Interpretation(studied, "not active", None, [])
    explanation = token_explanation(studied.examples.tokens)
    return Interpretation(studied, "explained", explanation, token_scores(studied.examples))


def _by_models(judge: Judge, studied: StudiedLatent, source: Source) -> Interpretation:
    if not _can_be_tested(studied.examples):
        return Interpretation(studied, "not active", None, [])
    explanation = judge.explain(studied.examples, source)
    if explanation is None:
        return Interpretation(studied, "no answer", None, [])
    return Interpretation(studied, "explained", explanation, judge.scores(studied.examples, explanation, source))


def _can_be_tested(examples: LatentExamples) -> bool:
    return bool(examples.top and examples.activating)


def _estimate(judge: Judge, latents: Sequence[StudiedLatent], answers: StoredAnswers) -> Estimate:
    estimate = Estimate(answers)
    for studied in latents:
        _by_models(judge, studied, estimate)
    return estimate


def _judged(
    online: Online, latents: Sequence[StudiedLatent], answers: StoredAnswers, estimate: Estimate
) -> list[Interpretation]:
    """Asks the models about all latents, several at a time."""
    halted = threading.Event()
    n_requests = sum(estimate.n_asked.values()) + estimate.n_recalled
    with stop_requests() as stop, progress_bar(total=n_requests, desc="answers") as bar:
        asked = Asked(
            answers,
            ask=lambda request: online.endpoint(request, lambda: bool(stop) or halted.is_set()),
            tell=bar.update,
        )
        try:
            found = in_threads(
                lambda studied: _by_models(online.judge, studied, asked), latents, online.concurrency, halted.set
            )
        except Stopped:
            assert stop.signum is not None, "only a signal stops the threads before an error does"
            logger.info(f"{asked.n_asked} answers were kept; the same command goes on from there")
            raise Interrupted(stop.signum) from None
    logger.info(
        f"{asked.n_asked} requests sent, {asked.n_recalled} answers recalled; tokens as the endpoint counts them: "
        f"{asked.n_in} in, {asked.n_out} out"
    )
    return found
