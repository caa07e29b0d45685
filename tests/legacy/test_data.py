"""`e2e_sae.data`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_models import D_VOCAB, random_tokens
from tests.tiny_runs import N_CTX, write_rows


def test_the_data_loader_gives_the_rows_in_batches_and_the_tokenizer(
    tmp_path: Path, tiny_folder: Callable[[str], Path]
):
    from e2e_sae.data import DatasetConfig, create_data_loader

    data = DatasetConfig(
        dataset_name=str(write_rows(tmp_path / "rows.parquet", 5)),
        tokenizer_name=str(tiny_folder("gpt2")),
        n_ctx=N_CTX,
        split="train",
    )
    loader, tokenizer = create_data_loader(data, batch_size=2, buffer_size=3, global_seed=0)
    batches = [batch[data.column_name] for batch in loader]
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert len(loader) == 3
    assert sorted(torch.cat(batches).tolist()) == sorted(random_tokens(5, N_CTX).tolist())
    assert len(tokenizer) == D_VOCAB
    again, other = (create_data_loader(data, 5, global_seed=seed)[0] for seed in (0, 1))
    assert torch.equal(next(iter(again))["input_ids"], torch.cat(batches))
    assert not torch.equal(next(iter(other))["input_ids"], torch.cat(batches))


# Slow under the run-time shape checks only: `datasets` makes a fingerprint of every function it is given.
@pytest.mark.parametrize("is_streamed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_text_is_packed_with_bos_and_no_document_is_lost(is_streamed: bool, tiny_folder: Callable[[str], Path]):
    from datasets import Dataset
    from transformers import AutoTokenizer

    from e2e_sae.data import _keep_single_column, tokenize_and_concatenate

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder("gpt2"))
    dataset: Any = Dataset.from_dict({"text": ["abc", "de"], "n": [1, 2]})
    dataset = dataset.to_iterable_dataset() if is_streamed else dataset
    assert list(next(iter(_keep_single_column(dataset, "text")))) == ["text"]
    packed = tokenize_and_concatenate(dataset, tokenizer, max_length=4, add_bos_token=True)
    a, b, c, d, e = tokenizer("abcde")["input_ids"]
    end = tokenizer.eos_token_id
    # abc<eos>de<eos> in threes, BOS before each; the last incomplete row is dropped.
    rows = [row["input_ids"] for row in packed]
    assert [row.tolist() for row in rows] == [[end, a, b, c], [end, end, d, e]]
    assert all(isinstance(row, Tensor) for row in rows)
