"""Batches of token rows, addressed by the number of the sample: the same number is always the same row.

That number is all a checkpoint has to keep of the data. Rows in memory are permuted anew for each epoch;
a streamed data set is shuffled through a buffer and replayed to resume.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Integer
from numpy import ndarray
from torch import Tensor

from e2e_sae.data.dataset_config import DatasetConfig
from e2e_sae.data.packing import cut_rows, encode_documents, row_width, with_bos
from e2e_sae.data.remembered import RememberedRows
from e2e_sae.data.sources import (
    Part,
    TextSource,
    TokenTable,
    keep_part,
    open_source,
    part_indices,
)
from e2e_sae.errors import UserError

SHUFFLE_BUFFER_ROWS = 1_000
"""Rows that a streamed data set is shuffled through."""


class RowOrder(NamedTuple):
    """In which order rows come."""

    n_epochs: int = 1
    """Passes over the rows."""
    shuffle: bool = True
    """Each pass in a random order of its own; False: the source's order."""
    seed: int = 0
    """What the random orders depend on, besides the number of the pass."""

    def rng(self, epoch: int) -> np.random.Generator:
        """Returns the generator of one pass."""
        return np.random.default_rng([self.seed, epoch])


class TokenBatches(ABC):
    """Rows of `n_ctx` token ids, in a fixed order."""

    n_ctx: int
    """Tokens in a row."""
    n_samples: int | None
    """Rows over all epochs; None if that is not known before the end (streamed data)."""
    is_in_memory: bool = False
    """Whether a batch takes no reading, decoding or tokenising."""

    @abstractmethod
    def iterate(self, batch_size: int, start: int = 0) -> Iterator[Int[Tensor, "batch n_ctx"]]:
        """Yields int64 batches on the CPU, from the row with number `start` on; the last may be short."""


class Rows(ABC):
    """A table of token rows that can be read in any order."""

    n_ctx: int
    """Tokens in a row."""
    is_in_memory: bool
    """Whether they are all there, and need no decoding."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, indices: Integer[ndarray, " n"]) -> Integer[ndarray, "n n_ctx"]:
        """Returns the rows with these numbers."""


class PackedText(Rows):
    """A token stream cut into rows, each begun by `bos_id` if there is one."""

    is_in_memory = True

    def __init__(self, stream: Integer[ndarray, " n_tokens"], n_ctx: int, bos_id: int | None) -> None:
        self.stream = stream
        self.n_ctx = n_ctx
        self.bos_id = bos_id
        self.width = row_width(n_ctx, bos_id)

    def __len__(self) -> int:
        return len(self.stream) // self.width

    def take(self, indices: Integer[ndarray, " n"]) -> Integer[ndarray, "n n_ctx"]:
        return self.at_offsets(indices * self.width)

    def at_offsets(self, offsets: Integer[ndarray, " n"]) -> Integer[ndarray, "n n_ctx"]:
        """Returns the rows whose text begins at these places of the stream."""
        return with_bos(self.stream[offsets[:, None] + np.arange(self.width)], self.bos_id)


class IndexedBatches(TokenBatches):
    """Rows that can be read in any order, permuted anew in each epoch."""

    def __init__(self, rows: Rows, order: RowOrder) -> None:
        self.rows = rows
        self.n_ctx = rows.n_ctx
        self.n_samples = len(rows) * order.n_epochs
        self.is_in_memory = rows.is_in_memory
        self._order = order

    def iterate(self, batch_size: int, start: int = 0) -> Iterator[Int[Tensor, "batch n_ctx"]]:
        order, order_epoch = np.empty(0, dtype=np.int64), -1
        n_samples = len(self.rows) * self._order.n_epochs
        for first in range(start, n_samples, batch_size):
            last = min(first + batch_size, n_samples)
            pieces: list[ndarray] = []
            while first < last:
                epoch, offset = divmod(first, len(self.rows))
                if epoch != order_epoch:
                    order, order_epoch = self._permutation(epoch), epoch
                piece = order[offset : offset + last - first]
                pieces.append(piece)
                first += len(piece)
            batch = self.rows.take(np.concatenate(pieces))
            yield torch.from_numpy(np.ascontiguousarray(batch, dtype=np.int64))

    def _permutation(self, epoch: int) -> Integer[ndarray, " n_rows"]:
        n_rows = len(self.rows)
        return self._order.rng(epoch).permutation(n_rows) if self._order.shuffle else np.arange(n_rows)


class TokenTableRows(Rows):
    """The rows of a token table that have the given numbers, their ids checked as they are read."""

    def __init__(self, table: Any, kept: Integer[ndarray, " n_rows"], n_ctx: int, check: "IdCheck") -> None:
        self._table = table
        self._kept = kept
        self._check = check
        self.n_ctx = n_ctx
        self.is_in_memory = isinstance(table, ndarray) and not isinstance(table, np.memmap)

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, indices: Integer[ndarray, " n"]) -> Integer[ndarray, "n n_ctx"]:
        return self._check(np.asarray(self._table[self._kept[indices]]))


class IdCheck:
    """Passes arrays of token ids through, and refuses ids outside the vocabulary."""

    def __init__(self, d_vocab: int | None, source: str) -> None:
        self._d_vocab = d_vocab
        self._source = source

    def __call__(self, ids: Integer[ndarray, "*any"]) -> Integer[ndarray, "*any"]:
        if ids.size == 0:
            return ids
        least, greatest = int(ids.min()), int(ids.max())
        if least < 0:
            raise UserError(f"token id {least} in '{self._source}' is negative: these are no token ids")
        if self._d_vocab is not None and greatest >= self._d_vocab:
            raise UserError(
                f"token id {greatest} in '{self._source}' is outside the model's vocabulary of "
                f"{self._d_vocab}: the data were tokenised for another model"
            )
        return ids


class StreamedBatches(TokenBatches):
    """Rows that come one after another, shuffled through a buffer.

    To begin later, the rows before are gone through again.
    """

    def __init__(
        self,
        read: Callable[[], Iterator[Integer[ndarray, " n_ctx"]]],
        n_ctx: int,
        order: RowOrder,
    ) -> None:
        self.n_ctx = n_ctx
        self.n_samples = None
        self.n_buffer_rows = SHUFFLE_BUFFER_ROWS
        self._read = RememberedRows(read)
        self._order = order

    def iterate(self, batch_size: int, start: int = 0) -> Iterator[Int[Tensor, "batch n_ctx"]]:
        rows = islice(chain.from_iterable(self._epoch(e) for e in range(self._order.n_epochs)), start, None)
        while batch := list(islice(rows, batch_size)):
            yield torch.from_numpy(np.stack(batch).astype(np.int64))

    def _epoch(self, epoch: int) -> Iterator[Integer[ndarray, " n_ctx"]]:
        rows = self._read()
        if not self._order.shuffle:
            yield from rows
            return
        rng = self._order.rng(epoch)
        buffer = list(islice(rows, self.n_buffer_rows))
        for row in rows:
            i = int(rng.integers(len(buffer)))
            yield buffer[i]
            buffer[i] = row
        yield from (buffer[i] for i in rng.permutation(len(buffer)))


def load_token_batches(
    config: DatasetConfig,
    *,
    global_seed: int,
    part: Part = "all",
    tokenizer: Any = None,
    d_vocab: int | None = None,
    max_n_ctx: int | None = None,
) -> TokenBatches:
    """Returns the batches that `config` describes.

    Args:
        global_seed: shuffle seed if `config.seed` is None.
        part: `train`: without what `config.holdout_fraction` keeps; `eval`: only that; `all`: everything.
        tokenizer: used for text if `config.tokenizer_name` is None.
        d_vocab: the model's vocabulary, to check ids against.
        max_n_ctx: the model's longest context, to check `config.n_ctx` against.

    Raises:
        UserError: the data cannot be found or read, hold something else than the config says, or are less
            than one row.
    """
    if max_n_ctx is not None and config.n_ctx > max_n_ctx:
        raise UserError(f"n_ctx={config.n_ctx} is longer than the model's context of {max_n_ctx}")
    unknown_ids = [i for i in config.exclude_token_ids if d_vocab is not None and i >= d_vocab]
    if unknown_ids:
        raise UserError(f"exclude_token_ids {unknown_ids} are outside the model's vocabulary of {d_vocab}")
    source = open_source(config)
    check = IdCheck(d_vocab, config.dataset_name)
    # Evaluation reads each row once.
    order = RowOrder(
        n_epochs=1 if part == "eval" else config.n_epochs,
        shuffle=config.shuffle,
        seed=global_seed if config.seed is None else config.seed,
    )
    fraction = config.holdout_fraction
    if isinstance(source, TextSource):
        tokenizer = _tokenizer(config, tokenizer)
        bos_id = _bos_id(config, tokenizer)

        def pieces() -> Iterator[ndarray]:
            return map(check, encode_documents(keep_part(source.read(), part, fraction), tokenizer))

        if source.is_streamed:
            return StreamedBatches(lambda: cut_rows(pieces(), config.n_ctx, bos_id), config.n_ctx, order)
        packed = PackedText(_joined(pieces()), config.n_ctx, bos_id)
        _check_size(len(packed), config, part, f"{len(packed.stream)} tokens")
        return IndexedBatches(packed, order)
    if isinstance(source, TokenTable):
        kept = part_indices(len(source.rows), part, fraction)
        _check_size(len(kept), config, part, f"{len(source.rows)} rows")
        if isinstance(source.rows, ndarray):
            check(source.rows)
        return IndexedBatches(TokenTableRows(source.rows, kept, config.n_ctx, check), order)
    return StreamedBatches(lambda: map(check, keep_part(source.read(), part, fraction)), config.n_ctx, order)


def same_rows(train: DatasetConfig, eval: DatasetConfig) -> bool:
    """Says whether two configs read the same data, so that evaluating would be on what is trained on."""
    fields = ("dataset_name", "name", "revision", "data_files", "split", "column_name")
    return all(getattr(train, field) == getattr(eval, field) for field in fields)


def load_tokenizer(name: str) -> Any:
    """Returns the tokenizer of a local folder or of the hub.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if Path(name).is_dir():
            raise UserError(f"tokenizer '{name}' cannot be loaded: expected tokenizer.json in that folder") from None
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"tokenizer '{name}' cannot be loaded: {reason}") from None


def _tokenizer(config: DatasetConfig, tokenizer: Any) -> Any:
    if config.tokenizer_name is not None:
        return load_tokenizer(config.tokenizer_name)
    if tokenizer is None:
        raise UserError(
            f"'{config.dataset_name}' is text and must be tokenised, but the model brings no tokenizer: "
            "set tokenizer_name"
        )
    return tokenizer


def _bos_id(config: DatasetConfig, tokenizer: Any) -> int | None:
    if config.add_bos is False:
        return None
    if tokenizer.bos_token_id is None and config.add_bos:
        raise UserError("add_bos is true, but the tokenizer has no BOS token: set add_bos: false")
    return tokenizer.bos_token_id


def _joined(pieces: Iterator[Integer[ndarray, " _"]]) -> Integer[ndarray, " n_tokens"]:
    """Returns the pieces as one array of uint16 if every id fits, else int32."""
    parts: list[ndarray] = []
    greatest = 0
    for piece in pieces:
        greatest = max(greatest, int(piece.max()))
        parts.append(piece.astype(np.int32))
    dtype = np.uint16 if greatest < 2**16 else np.int32
    return np.concatenate([p.astype(dtype) for p in parts]) if parts else np.empty(0, dtype)


def _check_size(n_rows: int, config: DatasetConfig, part: Part, found: str) -> None:
    if n_rows > 0:
        return
    of_part = f" in the part for {part} (holdout_fraction={config.holdout_fraction})" if part != "all" else ""
    raise UserError(
        f"'{config.dataset_name}' is too small{of_part}: {found}, not one row of n_ctx={config.n_ctx} tokens"
    )
