"""Where in the data each latent is most active: the token, and the text around it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor

from e2e_sae.analysis.activities import activities
from e2e_sae.analysis.study import Study
from e2e_sae.models.tokenizers import require_tokenizer

N_BEFORE, N_AFTER = 8, 3
"""Tokens of text around the strongest one."""
MARKS = "«", "»"
"""What it stands between."""


class Strongest(NamedTuple):
    """Of each latent the place of its greatest activation; in all lists latents are in the order asked for."""

    activation: list[float]
    """Its size; 0: the latent was never active."""
    token: list[str]
    """The token."""
    token_position: list[int]
    """Its place in the row, from 0 on; -1: none."""
    context: list[str]
    """The text around it."""


def strongest_tokens(study: Study, run_id: str, position: str, latents: Int[Tensor, " n"]) -> Strongest:
    """Returns where latents are most active on the study's rows, the SAE alone on clean activations.

    One pass over the rows, in memory that does not grow with them, but for the tokens; kept in the study's cache.

    Raises:
        UserError: the run names no evaluation data, its language model is not to be had, or it has no tokenizer.
    """
    found, data = activities(study, run_id, [position], "strongest tokens")
    activity = found[position]
    tokenizer = require_tokenizer(study.lm(study.stored(run_id)))
    rows: list[list[int]] = data.tokens.tolist()
    n_ctx = data.tokens.shape[1]
    places: list[int] = activity.top[latents, 0].tolist()
    texts = [_texts(tokenizer, rows[place // n_ctx], place % n_ctx) if place >= 0 else ("", "") for place in places]
    return Strongest(
        activation=activity.largest[latents].tolist(),
        token=[token for token, _ in texts],
        token_position=[place % n_ctx if place >= 0 else -1 for place in places],
        context=[context for _, context in texts],
    )


def _texts(tokenizer: Any, row: Sequence[int], at: int) -> tuple[str, str]:
    """Returns the token at a place of a row, and the text around it in one line."""
    first = max(0, at - N_BEFORE)
    before, token, after = (
        _text(tokenizer, ids) for ids in (row[first:at], row[at : at + 1], row[at + 1 : at + 1 + N_AFTER])
    )
    return token, f"{before}{MARKS[0]}{token}{MARKS[1]}{after}"


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False).replace("\n", "⏎")
