"""A data set of token rows, made once from text: tokenised, packed, shuffled, as parquet files or on the hub.

Like the paper's published data sets: an end-of-text id after every document, rows of `n_ctx` that run over document
borders, one column `input_ids`. Where the text is streamed, memory holds a few thousand rows at a time.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from jaxtyping import Integer
from numpy import ndarray

from e2e_sae.checkpoint.files import check_is_free, new_folder
from e2e_sae.data.batches import load_token_batches
from e2e_sae.data.dataset_config import DatasetConfig
from e2e_sae.errors import UserError
from e2e_sae.progress import progress_bar

COLUMN = "input_ids"
SHARD_BYTES = 500_000_000
"""Size of a parquet file before compression, as in the published data sets."""
_CHUNK_ROWS = 1_000


def write_token_dataset(config: DatasetConfig, out: Path) -> int:
    """Writes the rows of a text as `<split>-00000-of-00003.parquet` and so on, and returns how many there are.

    Args:
        config: the text, its tokenizer, `n_ctx`, and the seed of the rows' order.
        out: the folder; must not exist, or be empty.

    Raises:
        UserError: the text cannot be had, is less than one row, or `out` is there already.
    """
    check_is_free(out)
    seed = config.seed or 0
    batches = load_token_batches(config.model_copy(update={"shuffle": False}), global_seed=seed)
    with new_folder(out) as folder:
        # The rows go to the disk first: their number, and so their order, is known at the end only.
        unshuffled = folder / "rows.i32"
        with unshuffled.open("wb") as file:
            for batch in progress_bar(batches.iterate(_CHUNK_ROWS), desc="tokenising", unit=f" x {_CHUNK_ROWS} rows"):
                file.write(batch.numpy().astype(np.int32).tobytes())
        n_rows = unshuffled.stat().st_size // (4 * config.n_ctx)
        if n_rows == 0:
            raise UserError(f"'{config.dataset_name}' is too small: not one row of n_ctx={config.n_ctx} tokens")
        rows = np.memmap(unshuffled, dtype=np.int32, mode="r", shape=(n_rows, config.n_ctx))
        _write_shards(folder, config.split, rows, np.random.default_rng(seed).permutation(n_rows))
        del rows
        unshuffled.unlink()
    return n_rows


def default_repo_id(config: DatasetConfig, user: str) -> str:
    """Returns `<user>/<source>-tokenizer-<tokenizer>`, as the published data sets are named."""
    source = config.dataset_name
    source = Path(source).stem if Path(source).exists() else source
    split = "" if config.split == "train" else f"{config.split}-"
    tokenizer = str(config.tokenizer_name)
    tokenizer = Path(tokenizer).name if Path(tokenizer).exists() else tokenizer
    return f"{user}/{source.replace('/', '-')}-{split}tokenizer-{tokenizer.replace('/', '-')}"


def hub_user() -> str:
    """Returns the name of the hub's user who is logged in.

    Raises:
        UserError: nobody is, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, errors

    try:
        return HfApi().whoami()["name"]
    except errors.LocalTokenNotFoundError:
        raise UserError("nobody is logged in to the Hugging Face hub: log in first (hf auth login)") from None
    except (OSError, ValueError, errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise UserError(f"cannot ask the Hugging Face hub who is logged in: {_short(error)}") from None


def push_token_dataset(folder: Path, repo_id: str, split: str, private: bool) -> str:
    """Uploads what `write_token_dataset` wrote, and returns the data set's address.

    Raises:
        UserError: the hub refuses it or cannot be reached.
    """
    from datasets import Dataset
    from huggingface_hub import errors

    files: list[Any] = [str(path) for path in sorted(folder.glob("*.parquet"))]
    try:
        with TemporaryDirectory() as cache:
            data: Any = Dataset.from_parquet(files, cache_dir=cache)
            return str(data.push_to_hub(repo_id, split=split, private=private, max_shard_size="500MB").repo_url)
    except (OSError, ValueError, errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise UserError(f"cannot push to '{repo_id}' on the Hugging Face hub: {_short(error)}") from None


def _write_shards(
    folder: Path, split: str, rows: Integer[ndarray, "n_rows n_ctx"], order: Integer[ndarray, " n_rows"]
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    n_ctx = rows.shape[1]
    n_shards = -(-rows.nbytes // SHARD_BYTES)
    schema = pa.schema({COLUMN: pa.list_(pa.int32())})
    for i, shard in enumerate(np.array_split(order, n_shards)):
        with parquet.ParquetWriter(folder / f"{split}-{i:05}-of-{n_shards:05}.parquet", schema) as writer:
            for chunk in _chunks(shard):
                values = rows[chunk]
                offsets = pa.array(np.arange(0, values.size + 1, n_ctx, dtype=np.int32))
                column = pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)))
                writer.write_table(pa.table({COLUMN: column}, schema=schema))


def _chunks(order: Integer[ndarray, " n"]) -> Iterator[Integer[ndarray, " n_chunk"]]:
    return (order[i : i + _CHUNK_ROWS] for i in range(0, len(order), _CHUNK_ROWS))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
