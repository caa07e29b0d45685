"""Local files as texts or token rows: parquet, jsonl, arrow, txt, and flat token files.

`.u16` and `.u32` are little-endian unsigned token ids and nothing else. A `.txt` file is one document, or
several with `<|endoftext|>` between them. Read with pyarrow: `datasets` would cost seconds at import.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer
from numpy import ndarray

from e2e_sae.errors import MissingFileError, UserError, did_you_mean

DOCUMENT_SEPARATOR = "<|endoftext|>"
FLAT_DTYPES = {".u16": np.dtype("<u2"), ".u32": np.dtype("<u4")}
TABLE_SUFFIXES = (".parquet", ".jsonl", ".arrow")
SUFFIXES = (*TABLE_SUFFIXES, ".txt", *FLAT_DTYPES)

Column = Iterator[list[Any]]


class LocalFiles(NamedTuple):
    """Files of one kind, in the order they are read."""

    paths: list[Path]
    suffix: str
    source: str
    """What the user called them."""


def find_files(source: Path, patterns: Sequence[str] | None) -> LocalFiles:
    """Returns the data files that a path means: itself, or those in the folder, sorted by path.

    Args:
        patterns: shell patterns inside the folder; None: every file with a known suffix.

    Raises:
        UserError: no data file, an unknown suffix, or files of several kinds.
    """
    if source.is_dir():
        paths = _matches(source, patterns)
    elif source.exists():
        if patterns:
            raise UserError(f"data_files is given, but '{source}' is a file: name its folder, or drop data_files")
        paths = [source]
    else:
        raise MissingFileError(f"no such file or folder: '{source}'")
    known = ", ".join(SUFFIXES)
    kinds = sorted({_kind(path) for path in paths})
    for kind in kinds:
        if kind not in SUFFIXES:
            raise UserError(f"'{source}' is of an unknown kind '{kind}': expected one of {known}")
    if not paths:
        raise UserError(f"no data files in '{source}': expected files ending in one of {known}")
    if len(kinds) > 1:
        raise UserError(f"'{source}' holds files of several kinds ({', '.join(kinds)}): choose with data_files")
    return LocalFiles(paths, kinds[0], str(source))


def read_documents(files: LocalFiles, column: str) -> Iterator[str]:
    """Yields the texts of `.txt` files or of a table's column.

    Raises:
        UserError: no such column, or no text in it.
    """
    for path in files.paths:
        if files.suffix == ".txt":
            yield from _text_documents(path)
            continue
        for values in _column_values(path, files.suffix, column):
            for value in values:
                if not isinstance(value, str):
                    raise UserError(not_text_message(column, str(path), value))
                yield value


def read_flat_tokens(files: LocalFiles) -> Integer[ndarray, " n_tokens"]:
    """Returns the ids of `.u16` or `.u32` files, one after another; a single file is memory-mapped.

    Raises:
        UserError: a file's size is no multiple of its item's.
    """
    dtype = FLAT_DTYPES[files.suffix]
    arrays: list[ndarray] = []
    for path in files.paths:
        n_bytes = path.stat().st_size
        if n_bytes % dtype.itemsize:
            raise UserError(
                f"'{path}' has {n_bytes} bytes, no multiple of {dtype.itemsize}: not a whole number of "
                f"{files.suffix} tokens"
            )
        arrays.append(np.memmap(path, dtype=dtype, mode="r") if n_bytes else np.empty(0, dtype))
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def read_token_rows(files: LocalFiles, column: str, n_ctx: int) -> Integer[ndarray, "n_rows n_ctx"]:
    """Returns the rows of token ids in a table's column.

    Raises:
        UserError: no such column, no token ids in it, or rows that are not `n_ctx` long.
    """
    parts: list[ndarray] = []
    n_rows = 0
    for path in files.paths:
        for values in _column_values(path, files.suffix, column, as_arrays=True):
            part = token_rows(values, n_ctx, column, str(path), n_rows)
            n_rows += len(part)
            parts.append(part)
    return np.concatenate(parts) if parts else np.empty((0, n_ctx), dtype=np.int64)


def token_rows(
    values: Iterable[Any], n_ctx: int, column: str, source: str, first_row: int = 0
) -> Integer[ndarray, "n_rows n_ctx"]:
    """Returns lists of token ids as one array, after checking that each is `n_ctx` integers.

    Args:
        first_row: number of the first row in its source, for the message.

    Raises:
        UserError: something else than rows of `n_ctx` integers.
    """
    rows: list[ndarray] = []
    for i, value in enumerate(values, first_row):
        if isinstance(value, str):
            raise UserError(f"column '{column}' of '{source}' holds text, not token ids: set is_tokenized: false")
        row = np.asarray(value if value is not None else [])
        if row.ndim != 1 or (len(row) and row.dtype.kind not in "iu"):
            kind = type(value).__name__ if row.ndim != 1 else row.dtype
            raise UserError(f"column '{column}' of '{source}' holds no lists of token ids (row {i}: {kind})")
        if len(row) != n_ctx:
            raise UserError(
                f"row {i} of '{source}' has {len(row)} tokens, n_ctx is {n_ctx}: rows must be n_ctx long; "
                f"set n_ctx to {len(row)} or tokenise again"
            )
        rows.append(row)
    return np.stack(rows) if rows else np.empty((0, n_ctx), dtype=np.int64)


def table_columns(files: LocalFiles) -> list[str]:
    """Returns the names of a table's columns, by its first file."""
    path = files.paths[0]
    if files.suffix == ".jsonl":
        first = next(_json_lines(path), None)
        return list(first[1]) if first else []
    return list(_arrow_schema(path, files.suffix).names)


def check_column(column: str, columns: Sequence[str], source: str) -> None:
    """Raises a `UserError` that lists the columns if `column` is none of them."""
    if column not in columns:
        shown = ", ".join(columns) or "none"
        text = ", or is_tokenized: false if this is text" if "text" in columns else ""
        raise UserError(
            f"no column '{column}' in '{source}' (columns: {shown}): set column_name{text}."
            f"{did_you_mean(column, columns)}"
        )


def not_text_message(column: str, source: str, value: Any) -> str:
    """Returns what is wrong with a column that should hold text and holds `value`."""
    if isinstance(value, list | ndarray):
        return (
            f"column '{column}' of '{source}' holds token ids, but is_tokenized is false: set is_tokenized: "
            "true, or column_name to the column with the text"
        )
    return f"column '{column}' of '{source}' holds no text (found {type(value).__name__}): set column_name"


def _matches(folder: Path, patterns: Sequence[str] | None) -> list[Path]:
    if patterns is None:
        return sorted(p for p in folder.rglob("*") if p.is_file() and _kind(p) in SUFFIXES)
    found: set[Path] = set()
    for pattern in patterns:
        matches = {p for p in folder.glob(pattern) if p.is_file()}
        if not matches:
            raise UserError(f"data_files '{pattern}' matches no file in '{folder}'")
        found |= matches
    return sorted(found)


def _kind(path: Path) -> str:
    return path.suffix.lower()


def _text_documents(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not a UTF-8 text file (byte {error.start})") from None
    yield from (document for document in text.split(DOCUMENT_SEPARATOR) if document.strip())


def _column_values(path: Path, suffix: str, column: str, as_arrays: bool = False) -> Column:
    if suffix == ".jsonl":
        for number, line in _json_lines(path):
            if column not in line:
                check_column(column, list(line), f"{path}, line {number}")
            yield [line[column]]
        return
    for batch in _arrow_batches(path, suffix, column):
        values = batch.column(column)
        yield list(values.to_numpy(zero_copy_only=False)) if as_arrays else values.to_pylist()


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"line {number} of '{path}' is not valid JSON: {error.msg}") from None
            if not isinstance(value, dict):
                raise UserError(f"line {number} of '{path}' is no JSON object: expected {{\"column\": ...}}")
            yield number, value


def _arrow_schema(path: Path, suffix: str) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        if suffix == ".parquet":
            return parquet.read_schema(path)
        with _arrow_reader(path) as reader:
            return reader.schema
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"'{path}' is no readable {suffix[1:]} file: {_first_line(error)}") from None


def _arrow_batches(path: Path, suffix: str, column: str) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import parquet

    check_column(column, list(_arrow_schema(path, suffix).names), str(path))
    try:
        if suffix == ".parquet":
            with parquet.ParquetFile(path) as file:
                yield from file.iter_batches(batch_size=4096, columns=[column])
            return
        with _arrow_reader(path) as reader:
            if isinstance(reader, pa.RecordBatchFileReader):
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                yield from reader
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"'{path}' is no readable {suffix[1:]} file: {_first_line(error)}") from None


def _arrow_reader(path: Path) -> Any:
    """Returns a reader for either form of Arrow: the file, or the stream (which `datasets` writes)."""
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
