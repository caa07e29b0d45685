"""`e2e_sae.data` of the paper's library: a torch DataLoader, and packing of Hugging Face data sets."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from e2e_sae.data.batches import StreamedBatches, TokenBatches, load_token_batches, load_tokenizer
from e2e_sae.data.dataset_config import DatasetConfig
from e2e_sae.data.packing import cut_rows, encode_documents


def create_data_loader(
    dataset_config: DatasetConfig, batch_size: int, buffer_size: int = 1000, global_seed: int = 0
) -> tuple[DataLoader[dict[str, Tensor]], Any]:
    """Returns (batches, tokenizer). A batch is `{column_name: tokens}`, and has them under `input_ids` too.

    Args:
        buffer_size: rows that a streamed data set is shuffled through.
        global_seed: shuffle seed if the data have none of their own.

    Raises:
        UserError: data or tokenizer cannot be had.
    """
    name = dataset_config.tokenizer_name
    tokenizer = None if name is None else load_tokenizer(name)
    batches = load_token_batches(dataset_config, global_seed=global_seed, tokenizer=tokenizer)
    if isinstance(batches, StreamedBatches):
        batches.n_buffer_rows = buffer_size
    # The batches are ready-made: `batch_size=None` leaves them alone.
    return DataLoader(_Batches(batches, batch_size, dataset_config.column_name), batch_size=None), tokenizer


def tokenize_and_concatenate(
    dataset: Any,
    tokenizer: Any,
    max_length: int = 1024,
    column_name: str = "text",
    add_bos_token: bool = False,
    num_proc: int = 10,
) -> Any:
    """Returns a data set of one column, `input_ids`: rows of `max_length` tokens, documents ended by EOS.

    Args:
        dataset: a Hugging Face `Dataset`, or a streamed `IterableDataset`.
        add_bos_token: begin every row with BOS; it then holds `max_length - 1` tokens of text.
        num_proc: accepted; the tokenizer works in parallel by itself.
    """
    from datasets import Dataset
    from datasets import IterableDataset as StreamedDataset

    del num_proc
    bos_id = tokenizer.bos_token_id if add_bos_token else None
    texts = _keep_single_column(dataset, column_name)

    def rows() -> Iterator[dict[str, Any]]:
        documents = encode_documents((record[column_name] for record in texts), tokenizer)
        return ({"input_ids": row} for row in cut_rows(documents, max_length, bos_id))

    if isinstance(dataset, StreamedDataset):
        return StreamedDataset.from_generator(rows).with_format("torch")
    return Dataset.from_list(list(rows())).with_format("torch")


def _keep_single_column(dataset: Any, col_name: str) -> Any:
    """Returns the data set without its other columns; a stream's need not be known beforehand."""
    return dataset.select_columns([col_name])


class _Batches(IterableDataset[dict[str, Tensor]]):
    def __init__(self, batches: TokenBatches, batch_size: int, column_name: str) -> None:
        self._batches = batches
        self._batch_size = batch_size
        self._column_name = column_name

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for tokens in self._batches.iterate(self._batch_size):
            yield {"input_ids": tokens, self._column_name: tokens}

    def __len__(self) -> int:
        if self._batches.n_samples is None:
            raise TypeError("a streamed data set has no len()")
        return -(-self._batches.n_samples // self._batch_size)
