"""Generation with any TransformerLens model, one token at a time, every token from the full sequence.

Without a key-value cache on purpose: an SAE then sees each position in its whole context, and both model
classes, and any hooks that are in place, give the same text. Sampling is TransformerLens' own.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm

from e2e_sae.models.tokenizers import require_tokenizer


def generate(
    model: nn.Module,
    input: str | Int[Tensor, "batch pos"],
    *,
    max_new_tokens: int,
    stop_at_eos: bool,
    eos_token_id: int | Sequence[int] | None,
    do_sample: bool,
    top_k: int | None,
    top_p: float | None,
    temperature: float,
    freq_penalty: float,
    prepend_bos: bool | None,
    padding_side: Literal["left", "right"] | None,
    return_type: Literal["input", "str", "tensor"] | None,
    verbose: bool,
) -> str | Int[Tensor, "batch new_pos"] | None:
    """Returns the prompt and its continuation.

    Args:
        input: one text, or token ids.
        stop_at_eos: stop when every row has produced an end token; finished rows are filled up with it.
        eos_token_id: the end token(s); None: the tokenizer's.
        temperature: 0 picks the most likely token.
        prepend_bos: None: the model's default.
        return_type: "input": text for text, ids for ids; "str"; "tensor"; None: nothing is returned.

    Raises:
        UserError: a tokenizer is needed and the model has none.
    """
    from transformer_lens.utilities.logits_utils import sample_logits

    lm: Any = model
    is_text = isinstance(input, str)
    if is_text or return_type == "str" or (stop_at_eos and eos_token_id is None):
        require_tokenizer(model)
    device = next(model.parameters()).device
    if isinstance(input, str):
        options = {"prepend_bos": prepend_bos, "padding_side": padding_side}
        given = {key: value for key, value in options.items() if value is not None}
        tokens: Tensor = lm.to_tokens(input, **given)
    else:
        tokens = input
    tokens = tokens.to(device)
    eos = _eos_ids(lm, eos_token_id) if stop_at_eos else []
    finished = torch.zeros(tokens.shape[0], dtype=torch.bool, device=device)
    for _ in tqdm(range(max_new_tokens), disable=not verbose):
        logits = lm(tokens[:, -lm.cfg.n_ctx :], return_type="logits")[:, -1]
        if do_sample:
            new = sample_logits(
                logits,
                top_k=top_k,
                top_p=top_p,
                temperature=temperature,
                freq_penalty=freq_penalty,
                tokens=tokens,
            )
        else:
            new = logits.argmax(-1)
        new = new.to(device)
        if eos:
            new = torch.where(finished, torch.full_like(new, eos[0]), new)
            finished = finished | torch.isin(new, torch.tensor(eos, device=device))
        tokens = torch.cat([tokens, new[:, None]], dim=1)
        if eos and bool(finished.all()):
            break
    if return_type == "str" or (return_type == "input" and is_text):
        # TransformerLens drops the BOS that it prepended itself.
        drop = int(bool(lm.cfg.default_prepend_bos if prepend_bos is None else prepend_bos) and is_text)
        return lm.tokenizer.decode(tokens[0, drop:])
    return None if return_type is None else tokens


def _eos_ids(lm: Any, eos_token_id: int | Sequence[int] | None) -> list[int]:
    if eos_token_id is None:
        found = lm.tokenizer.eos_token_id
        return [] if found is None else [found]
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
