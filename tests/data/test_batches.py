from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from e2e_sae.data.batches import (
    SHUFFLE_BUFFER_ROWS,
    IndexedBatches,
    PackedText,
    TokenBatches,
    load_token_batches,
    same_rows,
)
from e2e_sae.data.dataset_config import DatasetConfig
from e2e_sae.errors import UserError
from tests.data.word_tokenizer import BOS, EOS, save_word_tokenizer, text_of, word_tokenizer

N_CTX = 3


def token_file(tmp_path: Path, n_rows: int) -> Path:
    """Row i is [i, i, i]."""
    path = tmp_path / "tokens.u16"
    path.write_bytes(np.repeat(np.arange(n_rows, dtype="<u2"), N_CTX).tobytes())
    return path


def jsonl_file(tmp_path: Path, n_rows: int) -> Path:
    """Row i is [i, i, i]."""
    path = tmp_path / "tokens.jsonl"
    path.write_text("".join(f'{{"input_ids": {[i] * N_CTX}}}\n' for i in range(n_rows)))
    return path


def text_file(tmp_path: Path, *documents: str) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>".join(documents))
    return path


def load(path: Path | str, tokenizer: Any = None, part: Any = "all", **fields: Any) -> TokenBatches:
    fields = {"dataset_name": str(path), "n_ctx": N_CTX} | fields
    return load_token_batches(DatasetConfig(**fields), global_seed=0, part=part, tokenizer=tokenizer)


def streamed(path: Path, **fields: Any) -> TokenBatches:
    return load("json", data_files=[str(path)], streaming=True, **fields)


def rows_of(batches: TokenBatches, batch_size: int = 4, start: int = 0) -> list[list[int]]:
    return [row for batch in batches.iterate(batch_size, start) for row in batch.tolist()]


def firsts(batches: TokenBatches, start: int = 0) -> list[int]:
    return [row[0] for row in rows_of(batches, start=start)]


def test_batches_are_int64_on_the_cpu_and_only_the_last_is_short(tmp_path: Path):
    batches = list(load(token_file(tmp_path, 10)).iterate(4))
    assert [tuple(b.shape) for b in batches] == [(4, N_CTX), (4, N_CTX), (2, N_CTX)]
    assert {b.dtype for b in batches} == {torch.int64}
    assert {b.device.type for b in batches} == {"cpu"}


def test_without_shuffling_rows_come_in_the_files_order(tmp_path: Path):
    assert rows_of(load(token_file(tmp_path, 5), shuffle=False)) == [[i] * N_CTX for i in range(5)]


def test_shuffling_permutes_and_the_seed_alone_decides_how(tmp_path: Path):
    path = token_file(tmp_path, 50)
    order = firsts(load(path))
    assert order != list(range(50))
    assert sorted(order) == list(range(50))
    assert firsts(load(path)) == order
    assert firsts(load(path, seed=0)) == order, "config.seed null means the run's seed"
    assert firsts(load(path, seed=1)) != order


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(tmp_path: Path):
    batches = load(token_file(tmp_path, 30), n_epochs=3)
    order = firsts(batches)
    epochs = [order[i : i + 30] for i in (0, 30, 60)]
    assert batches.n_samples == 90
    assert [sorted(epoch) for epoch in epochs] == [list(range(30))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] == firsts(load(token_file(tmp_path, 30)))


@pytest.mark.parametrize("start", [0, 1, 7, 10, 19, 20, 29, 30])
@pytest.mark.parametrize("shuffle", [True, False])
def test_starting_later_gives_the_tail_of_the_whole(start: int, shuffle: bool, tmp_path: Path):
    batches = load(token_file(tmp_path, 10), n_epochs=3, shuffle=shuffle)
    whole = rows_of(batches)
    assert len(whole) == 30
    assert rows_of(batches, batch_size=7, start=start) == whole[start:]


def test_the_batch_size_does_not_change_the_order(tmp_path: Path):
    batches = load(token_file(tmp_path, 11), n_epochs=2)
    assert rows_of(batches, 1) == rows_of(batches, 5) == rows_of(batches, 100)


# --- streams ---


@pytest.mark.filterwarnings("ignore")  # `datasets` warns in its own way
def test_a_stream_is_shuffled_replayed_and_repeated(tmp_path: Path):
    n_rows = SHUFFLE_BUFFER_ROWS + 50
    path = jsonl_file(tmp_path, n_rows)
    batches = streamed(path, n_epochs=2)
    order = firsts(batches)
    assert batches.n_samples is None
    assert sorted(order[:n_rows]) == sorted(order[n_rows:]) == list(range(n_rows))
    assert order[:n_rows] != list(range(n_rows))
    assert order[:n_rows] != order[n_rows:]
    assert firsts(batches, start=n_rows + 7) == order[n_rows + 7 :]
    assert firsts(batches, start=5) == order[5:]
    # A row can come early only by as much as the buffer holds.
    assert all(row <= place + SHUFFLE_BUFFER_ROWS for place, row in enumerate(order[:n_rows]))


@pytest.mark.filterwarnings("ignore")
def test_an_unshuffled_stream_keeps_the_files_order_and_can_hold_out_rows(tmp_path: Path):
    path = jsonl_file(tmp_path, 10)
    assert firsts(streamed(path, shuffle=False)) == list(range(10))
    assert firsts(streamed(path, shuffle=False, holdout_fraction=0.2, part="eval")) == [4, 9]
    assert firsts(streamed(path, shuffle=False, holdout_fraction=0.2, part="train")) == [0, 1, 2, 3, 5, 6, 7, 8]


@pytest.mark.filterwarnings("ignore")
def test_streamed_text_is_packed_like_local_text(tmp_path: Path):
    documents = [text_of(*range(2 + i, 5 + 2 * i)) for i in range(12)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f'{{"text": "{d}"}}\n' for d in documents))
    fields: dict[str, Any] = {"is_tokenized": False, "shuffle": False, "tokenizer": word_tokenizer()}
    assert rows_of(streamed(path, **fields)) == rows_of(load(path, **fields))


@pytest.mark.filterwarnings("ignore")
def test_a_downloaded_hub_dataset_is_permuted_like_a_local_file(tmp_path: Path):
    path = jsonl_file(tmp_path, 20)
    downloaded = load("json", data_files=[str(path)], streaming=False, n_epochs=2)
    assert downloaded.n_samples == 40
    assert rows_of(downloaded) == rows_of(load(path, n_epochs=2))


# --- text ---


def test_text_is_packed_over_document_borders(tmp_path: Path):
    path = text_file(tmp_path, text_of(10, 11), text_of(12), text_of(13, 14, 15))
    # The stream is 10 11 E 12 E 13 14 15 E.
    rows = rows_of(load(path, word_tokenizer(), is_tokenized=False, shuffle=False))
    assert rows == [[BOS, 10, 11], [BOS, EOS, 12], [BOS, EOS, 13], [BOS, 14, 15]]
    rows = rows_of(load(path, word_tokenizer(), is_tokenized=False, shuffle=False, add_bos=False))
    assert rows == [[10, 11, EOS], [12, EOS, 13], [14, 15, EOS]]
    rows = rows_of(load(path, word_tokenizer(bos=False), is_tokenized=False, shuffle=False))
    assert rows == [[10, 11, EOS], [12, EOS, 13], [14, 15, EOS]]


def test_the_configs_tokenizer_comes_before_the_models(tmp_path: Path):
    folder = save_word_tokenizer(tmp_path / "tokenizer")
    path = text_file(tmp_path, text_of(10, 11))
    rows = rows_of(load(path, object(), is_tokenized=False, tokenizer_name=str(folder)))
    assert rows == [[BOS, 10, 11]]


def test_the_held_out_documents_are_not_trained_on(tmp_path: Path):
    path = text_file(tmp_path, *(text_of(*[10 + i] * 5) for i in range(20)))
    fields: dict[str, Any] = {"is_tokenized": False, "holdout_fraction": 0.25}
    seen = {
        part: {token for row in rows_of(load(path, word_tokenizer(), part, **fields)) for token in row} - {BOS, EOS}
        for part in ("train", "eval", "all")
    }
    assert seen["eval"] == {13, 17, 21, 25, 29}
    assert seen["train"] == set(range(10, 30)) - seen["eval"]
    assert seen["all"] == set(range(10, 30))


def test_the_held_out_part_is_read_once_however_many_epochs_there_are(tmp_path: Path):
    fields: dict[str, Any] = {"holdout_fraction": 0.5, "n_epochs": 3}
    assert load(token_file(tmp_path, 10), part="eval", **fields).n_samples == 5
    assert load(token_file(tmp_path, 10), part="train", **fields).n_samples == 15


def test_ids_beyond_16_bits_are_kept(tmp_path: Path):
    class Tokenizer:
        bos_token_id, eos_token_id = None, 100_000

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[70_000, 70_001] for _ in texts]}

    rows = rows_of(load(text_file(tmp_path, "x"), Tokenizer(), is_tokenized=False))
    assert rows == [[70_000, 70_001, 100_000]]


def test_rows_may_begin_anywhere_in_packed_text():
    packed = PackedText(np.arange(10, 20), n_ctx=4, bos_id=BOS)
    assert len(packed) == 3
    assert packed.take(np.array([2, 0])).tolist() == [[BOS, 16, 17, 18], [BOS, 10, 11, 12]]
    assert packed.at_offsets(np.array([7])).tolist() == [[BOS, 17, 18, 19]]


def test_the_stdlib_corpus_is_packed_with_a_given_tokenizer():
    fields: dict[str, Any] = {"split": "eval", "is_tokenized": False, "n_ctx": 16, "shuffle": False}
    batches = load("stdlib", word_tokenizer(), **fields)
    assert isinstance(batches, IndexedBatches)
    assert next(batches.iterate(2))[:, 0].tolist() == [BOS, BOS]


# --- what can be wrong ---


def problem(path: Path | str, **arguments: Any) -> str:
    limits = {key: arguments.pop(key) for key in ("d_vocab", "max_n_ctx", "tokenizer", "part") if key in arguments}
    config = DatasetConfig.from_dict({"dataset_name": str(path), "n_ctx": N_CTX} | arguments)
    with pytest.raises(UserError) as error:
        list(load_token_batches(config, global_seed=0, **limits).iterate(4))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_context_longer_than_the_models_is_refused(tmp_path: Path):
    assert problem(token_file(tmp_path, 4), max_n_ctx=2) == "n_ctx=3 is longer than the model's context of 2"


@pytest.mark.filterwarnings("ignore")
def test_ids_outside_the_vocabulary_name_the_id_and_the_vocabulary(tmp_path: Path):
    message = problem(token_file(tmp_path, 10), d_vocab=9)
    assert "token id 9 in" in message
    assert "outside the model's vocabulary of 9" in message
    assert "outside the model's vocabulary of 9" in problem(
        "json", data_files=[str(jsonl_file(tmp_path, 10))], d_vocab=9
    )
    path = text_file(tmp_path, text_of(10, 11))
    assert "token id 11" in problem(path, is_tokenized=False, tokenizer=word_tokenizer(), d_vocab=11)
    parquet.write_table(pa.table({"input_ids": [[1, -2, 3]]}), tmp_path / "negative.parquet")
    assert "token id -2 in" in problem(tmp_path / "negative.parquet")


def test_less_than_one_row_is_too_small(tmp_path: Path):
    path = text_file(tmp_path, "w10")
    assert "is too small: 2 tokens, not one row of n_ctx=9 tokens" in problem(
        path, is_tokenized=False, tokenizer=word_tokenizer(), n_ctx=9
    )
    parquet.write_table(pa.table({"input_ids": pa.array([], pa.list_(pa.int32()))}), tmp_path / "none.parquet")
    assert "is too small: 0 rows" in problem(tmp_path / "none.parquet")
    assert "is too small: 0 rows" in problem(token_file(tmp_path, 1), n_ctx=4)
    (tmp_path / "empty.u16").write_bytes(b"")
    assert "is too small: 0 rows" in problem(tmp_path / "empty.u16")
    assert "in the part for eval (holdout_fraction=0.1)" in problem(
        token_file(tmp_path, 4), holdout_fraction=0.1, part="eval"
    )


def test_text_without_a_tokenizer_asks_for_one(tmp_path: Path):
    assert "is text and must be tokenised, but the model brings no tokenizer: set tokenizer_name" in problem(
        text_file(tmp_path, "a b c d"), is_tokenized=False
    )
    (tmp_path / "nothing").mkdir()
    assert "cannot be loaded" in problem(
        text_file(tmp_path, "a"), is_tokenized=False, tokenizer_name=str(tmp_path / "nothing")
    )


def test_a_bos_that_the_tokenizer_lacks_is_refused(tmp_path: Path):
    assert "the tokenizer has no BOS token: set add_bos: false" in problem(
        text_file(tmp_path, "w10 w11"), is_tokenized=False, tokenizer=word_tokenizer(bos=False), add_bos=True
    )


def test_same_rows_means_the_same_source_and_not_the_same_settings(tmp_path: Path):
    path = str(token_file(tmp_path, 4))
    train = DatasetConfig(dataset_name=path, n_ctx=N_CTX)
    assert same_rows(train, DatasetConfig(dataset_name=path, n_ctx=N_CTX, seed=7, shuffle=False))
    assert not same_rows(train, DatasetConfig(dataset_name=path, n_ctx=N_CTX, split="test"))
    assert not same_rows(train, DatasetConfig(dataset_name="other/data", n_ctx=N_CTX))
