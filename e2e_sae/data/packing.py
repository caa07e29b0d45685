"""Text to rows of token ids: documents are tokenised, an end-of-text id follows each, the stream is cut.

No document and no tail of a batch is lost: rows run over document borders, and only the last incomplete row
of the whole data set is dropped. With a BOS, every row is BOS and `n_ctx - 1` tokens of the stream.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import Integer
from numpy import ndarray

from e2e_sae.errors import UserError

# Tokenizers work on many texts at once in parallel. A chunk bounds the memory, and how long a stream waits for its next
# rows; smaller or larger ones take the same time per character.
_CHUNK_CHARACTERS = 200_000
_CHUNK_DOCUMENTS = 1_000
_TOKENIZING = Lock()


def separator_id(tokenizer: Any) -> int:
    """Returns the id put after each document: the tokenizer's EOS, or its BOS if it has no EOS.

    Raises:
        UserError: it has neither.
    """
    for token_id in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token_id is not None:
            return int(token_id)
    raise UserError(
        "the tokenizer has neither an EOS nor a BOS token, so documents cannot be separated: "
        "set one in the tokenizer, or tokenise the data yourself (is_tokenized: true)"
    )


def encode_documents(texts: Iterable[str], tokenizer: Any) -> Iterator[Integer[ndarray, " _"]]:
    """Yields the token ids of each text, the separator at its end and no other special token added."""
    end = separator_id(tokenizer)
    for chunk in _chunks(texts):
        # Training and evaluation may tokenise at the same time, each in its thread; a call may change the tokenizer.
        with _TOKENIZING:
            encoded = tokenizer(
                chunk, add_special_tokens=False, return_attention_mask=False, verbose=False
            )["input_ids"]  # fmt: skip
        for ids in encoded:
            yield np.asarray([*ids, end], dtype=np.int64)


def cut_rows(
    pieces: Iterable[Integer[ndarray, " _"]], n_ctx: int, bos_id: int | None
) -> Iterator[Integer[ndarray, " n_ctx"]]:
    """Yields rows of `n_ctx` from the concatenated pieces, each begun by `bos_id` if one is given.

    The last incomplete row is dropped.
    """
    width = row_width(n_ctx, bos_id)
    rest = np.empty(0, dtype=np.int64)
    for piece in pieces:
        rest = np.concatenate([rest, piece])
        n_whole = len(rest) // width
        yield from with_bos(rest[: n_whole * width].reshape(n_whole, width), bos_id)
        rest = rest[n_whole * width :]


def row_width(n_ctx: int, bos_id: int | None) -> int:
    """Returns the tokens of the stream in one row.

    Raises:
        UserError: a BOS leaves no room for text.
    """
    if bos_id is not None and n_ctx < 2:
        raise UserError(f"n_ctx={n_ctx} leaves no room for text after the BOS token: n_ctx must be 2 or more")
    return n_ctx - (bos_id is not None)


def with_bos(rows: Integer[ndarray, "n_rows width"], bos_id: int | None) -> Integer[ndarray, "n_rows n_ctx"]:
    """Returns the rows with `bos_id` in front of each, or unchanged if it is None."""
    return rows if bos_id is None else np.insert(rows, 0, bos_id, axis=1)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while True:
        chunk: list[str] = []
        n_characters = 0
        for text in islice(iterator, _CHUNK_DOCUMENTS):
            chunk.append(text)
            n_characters += len(text)
            if n_characters >= _CHUNK_CHARACTERS:
                break
        if not chunk:
            return
        yield chunk
