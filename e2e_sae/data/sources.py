"""Where data come from: the embedded corpus, local files, or a hub data set, as texts or as token rows.

The held-out part is decided by a document's (or row's) number alone, so that streams can do it too.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Integer
from numpy import ndarray

from e2e_sae.data.dataset_config import STDLIB_DATASET, DatasetConfig
from e2e_sae.data.local_files import (
    FLAT_DTYPES,
    check_column,
    find_files,
    not_text_message,
    read_documents,
    read_flat_tokens,
    read_token_rows,
    table_columns,
    token_rows,
)
from e2e_sae.data.stdlib_corpus import stdlib_documents
from e2e_sae.errors import MissingFileError, UserError

Part = Literal["train", "eval", "all"]
T = TypeVar("T")

_DEFAULT_COLUMN = DatasetConfig.model_fields["column_name"].default


class TextSource(NamedTuple):
    """Documents."""

    read: Callable[[], Iterator[str]]
    """Begins at the first document again with each call."""
    is_streamed: bool
    """They come from the network while they are used: nothing may need all of them at once."""


class TokenTable(NamedTuple):
    """Token rows that can be read in any order."""

    rows: Any
    """`[n_rows, n_ctx]` integers: an array, or something indexed like one."""


class TokenStream(NamedTuple):
    """Token rows that can only be read from the first on."""

    read: Callable[[], Iterator[Integer[ndarray, " n_ctx"]]]
    """Begins at the first row again with each call."""


Source = TextSource | TokenTable | TokenStream


def is_held_out(i: int, fraction: float) -> bool:
    """Says whether document number `i` is held out: iff floor((i + 1) f) > floor(i f)."""
    return int((i + 1) * fraction) > int(i * fraction)


def keep_part(items: Iterable[T], part: Part, fraction: float | None) -> Iterator[T]:
    """Yields the items that belong to `part`; all of them if nothing is held out."""
    if part == "all" or fraction is None:
        return iter(items)
    return (item for i, item in enumerate(items) if is_held_out(i, fraction) == (part == "eval"))


def part_indices(n: int, part: Part, fraction: float | None) -> Integer[ndarray, " n_kept"]:
    """Returns the numbers below `n` that belong to `part`, by the rule of `is_held_out`."""
    return np.fromiter(keep_part(range(n), part, fraction), dtype=np.int64)


def open_source(config: DatasetConfig) -> Source:
    """Returns what `config` names, with nothing held out yet.

    Raises:
        UserError: it cannot be found or read, or does not hold what the config says.
    """
    if config.dataset_name == STDLIB_DATASET:
        return _stdlib(config)
    path = Path(config.dataset_name)
    return _local(config, path) if path.exists() else _hub(config)


def _stdlib(config: DatasetConfig) -> TextSource:
    if config.is_tokenized:
        raise UserError(f"the '{STDLIB_DATASET}' corpus is text: set is_tokenized: false")
    if config.split not in ("train", "eval", "all"):
        raise UserError(f"the '{STDLIB_DATASET}' corpus has the splits train, eval and all (given: '{config.split}')")
    part: Part = config.split  # pyright: ignore[reportAssignmentType]
    return TextSource(lambda: (document.text for document in stdlib_documents(part)), is_streamed=False)


def _local(config: DatasetConfig, path: Path) -> Source:
    files = find_files(path, config.data_files)
    if files.suffix in FLAT_DTYPES:
        if not config.is_tokenized:
            raise UserError(f"'{path}' holds token ids, but is_tokenized is false: set is_tokenized: true")
        tokens = read_flat_tokens(files)
        n_rows = len(tokens) // config.n_ctx
        return TokenTable(tokens[: n_rows * config.n_ctx].reshape(n_rows, config.n_ctx))
    if files.suffix == ".txt":
        if config.is_tokenized:
            raise UserError(f"'{path}' is text: set is_tokenized: false")
        return TextSource(lambda: read_documents(files, ""), is_streamed=False)
    if config.is_tokenized:
        return TokenTable(read_token_rows(files, config.column_name, config.n_ctx))
    column = _text_column(config, table_columns(files))
    return TextSource(lambda: read_documents(files, column), is_streamed=False)


def _text_column(config: DatasetConfig, columns: list[str]) -> str:
    """Returns `column_name`, or `text` if the data have no such column and it was left at its default."""
    if config.column_name not in columns and config.column_name == _DEFAULT_COLUMN and "text" in columns:
        return "text"
    if columns:
        check_column(config.column_name, columns, config.dataset_name)
    return config.column_name


def _hub(config: DatasetConfig) -> Source:
    data = _load_hub(config)
    name = config.dataset_name
    columns = list(data.column_names or next(iter(data), {}))
    if not config.is_tokenized:
        column = _text_column(config, columns)

        def texts() -> Iterator[str]:
            for record in data.select_columns([column]):
                if not isinstance(record[column], str):
                    raise UserError(not_text_message(column, name, record[column]))
                yield record[column]

        return TextSource(texts, is_streamed=config.streaming)
    column = config.column_name
    check_column(column, columns, name)
    if not config.streaming:
        return TokenTable(_HubRows(data.select_columns([column]).with_format("numpy"), column, config))

    def rows() -> Iterator[ndarray]:
        for i, record in enumerate(data.select_columns([column])):
            yield token_rows([record[column]], config.n_ctx, column, name, i)[0]

    return TokenStream(rows)


class _HubRows:
    """A downloaded hub data set, indexed by row numbers; it stays on the disk."""

    def __init__(self, data: Any, column: str, config: DatasetConfig) -> None:
        self._data = data
        self._column = column
        self._config = config
        self.shape = (len(data), config.n_ctx)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, indices: Integer[ndarray, " n"]) -> Integer[ndarray, "n n_ctx"]:
        values = self._data[indices][self._column]
        return token_rows(values, self._config.n_ctx, self._column, self._config.dataset_name)


def _load_hub(config: DatasetConfig) -> Any:
    import datasets

    shown = f"data set '{config.dataset_name}'" + (f" (name: {config.name})" if config.name else "")
    try:
        return datasets.load_dataset(
            config.dataset_name,
            name=config.name,
            revision=config.revision,
            data_files=config.data_files,
            split=config.split,
            streaming=config.streaming,
        )
    except ConnectionError as error:
        raise UserError(
            f"{shown} is no local file or folder, and the hub cannot be reached: {_one_line(error)}"
        ) from None
    except FileNotFoundError as error:
        raise MissingFileError(f"{shown} is neither a local path nor on the hub: {_one_line(error)}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{shown} cannot be loaded: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
