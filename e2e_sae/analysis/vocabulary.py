"""The text of every token, as the model's tokenizer gives it, and how it is shown so that all of it is seen."""

from typing import Any, cast

from torch import nn

from e2e_sae.data.batches import load_tokenizer
from e2e_sae.errors import UserError
from e2e_sae.log import logger
from e2e_sae.models.lm import model_facts
from e2e_sae.models.tokenizers import require_tokenizer

_VISIBLE = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def vocabulary(lm: nn.Module, tokenizer_name: str | None = None) -> list[str]:
    """Returns the text of each token id, spaces included; `[id]` where there is no text, or no tokenizer.

    Args:
        lm: the language model, whose tokenizer comes first.
        tokenizer_name: folder or name on the hub of the one that made the data, for a model without.
    """
    n, owner = model_facts(lm).d_vocab, cast(Any, lm)
    try:
        if owner.tokenizer is None and tokenizer_name is not None:
            tokenizer = load_tokenizer(tokenizer_name)
        else:
            tokenizer = require_tokenizer(lm)
    except UserError as error:
        logger.warning(f"tokens are shown as numbers: {error}")
        return [f"[{i}]" for i in range(n)]
    known = range(min(n, len(tokenizer)))
    # After another token: some tokenizers take a space from the beginning of a text.
    anchor = next((i for i in known if tokenizer.decode([i]).isalpha()), 0)
    before = len(tokenizer.decode([anchor]))
    pairs = tokenizer.batch_decode([[anchor, i] for i in known], clean_up_tokenization_spaces=False)
    texts = [pair[before:] for pair in pairs] + [""] * (n - len(known))
    return [text or f"[{i}]" for i, text in enumerate(texts)]


def visible(text: str, spaces: bool = True) -> str:
    r"""Returns a text in which every character can be seen: `↵` and `⇥`, codes for what cannot be printed.

    Args:
        text: of a token, or of several.
        spaces: whether spaces become `·`.

    >>> visible(" if\n\u202e"), visible("a b", spaces=False)
    ('·if↵\\u202e', 'a b')
    """
    shown = "".join(_VISIBLE.get(c) or (c if c.isprintable() else _code(c)) for c in text)
    return shown.replace(" ", "·") if spaces else shown


def _code(c: str) -> str:
    return c.encode("unicode_escape").decode("ascii")
