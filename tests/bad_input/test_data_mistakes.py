"""Data that are missing, too few, of another kind than the config says, or made for another model."""

from collections.abc import Callable

import pytest

from tests.bad_input.bench import Bench

TEXT = "train_data.is_tokenized=false"

CASES: list[tuple[str, list[str], str]] = [
    # Not what the config says it is.
    ("text.parquet", [], "(columns: text): set column_name, or is_tokenized: false if this is text"),
    ("text.parquet", ["train_data.column_name=text"], "holds text, not token ids: set is_tokenized: false"),
    ("rows.parquet", [TEXT], "holds token ids, but is_tokenized is false: set is_tokenized: true, or column_name"),
    ("text.txt", [], "text.txt' is text: set is_tokenized: false"),
    ("zeros.u16", [TEXT], "holds token ids, but is_tokenized is false: set is_tokenized: true"),
    ("stdlib", [], "the 'stdlib' corpus is text: set is_tokenized: false"),
    ("stdlib", [TEXT, "train_data.split=test"], "has the splits train, eval and all (given: 'test')"),
    # Another column.
    (
        "rows.parquet",
        ["train_data.column_name=input_id"],
        "(columns: input_ids, number): set column_name. Did you mean",
    ),
    (
        "rows.parquet",
        ["train_data.column_name=number"],
        "column 'number' of 'FOLDER/rows.parquet' holds no lists of token",
    ),
    ("rows.parquet", [TEXT, "train_data.column_name=number"], "holds no text (found int): set column_name"),
    # Unreadable.
    ("broken.jsonl", [], "line 1 of 'FOLDER/broken.jsonl' is not valid JSON"),
    ("junk.parquet", [], "junk.parquet' is no readable parquet file"),
    ("latin1.txt", [TEXT], "latin1.txt' is not a UTF-8 text file (byte 1)"),
    ("table.csv", [], "is of an unknown kind '.csv': expected one of .parquet, .jsonl"),
    ("odd.u16", [], "has 9 bytes, no multiple of 2: not a whole number of .u16 tokens"),
    ("mixed", [], "holds files of several kinds (.jsonl, .txt): choose with data_files"),
    ("mixed", ["train_data.data_files='*.parquet'"], "data_files '*.parquet' matches no file in 'FOLDER/mixed'"),
    # Nothing there, or too little.
    ("empty_folder", [], "no data files in 'FOLDER/empty_folder': expected files ending in one of .parquet"),
    (
        "no_rows.parquet",
        [],
        "is too small in the part for train (holdout_fraction=0.25): 0 rows, not one row of n_ctx=8",
    ),
    ("empty.txt", [TEXT], "is too small in the part for train (holdout_fraction=0.25): 0 tokens"),
    ("short.txt", [TEXT, "train_data.holdout_fraction=null", "eval_every_n_samples=null"], "is too small: 4 tokens"),
    ("rows.parquet", ["train_data.holdout_fraction=0.001"], "in the part for eval (holdout_fraction=0.001): 64 rows"),
    (
        "rows.parquet",
        ["n_samples=49"],
        "n_samples=49 is more than the 48 rows of train_data (n_epochs=1): lower n_samples",
    ),
    ("rows.parquet", ["n_samples=4", "effective_batch_size=8"], "n_samples=4 is less than one optimizer step of 8"),
    # For another model or another n_ctx.
    (
        "other_vocabulary.parquet",
        [],
        "token id 50 in 'FOLDER/other_vocabulary.parquet' is outside the model's vocabulary of",
    ),
    ("negative.parquet", [], "token id -1 in 'FOLDER/negative.parquet' is negative: these are no token ids"),
    ("fractions.parquet", [], "holds no lists of token ids (row 0: float64)"),
    ("ragged.parquet", [], "row 1 of 'FOLDER/ragged.parquet' has 7 tokens, n_ctx is 8: rows must be n_ctx long"),
    ("rows.parquet", ["train_data.n_ctx=16"], "has 8 tokens, n_ctx is 16: rows must be n_ctx long; set n_ctx to 8"),
    ("rows.parquet", ["train_data.n_ctx=17"], "n_ctx=17 is longer than the model's context of 16"),
    ("text.txt", [TEXT, "train_data.n_ctx=1"], "n_ctx=1 leaves no room for text after the BOS token"),
    (
        "rows.parquet",
        ["train_data.exclude_token_ids=[3, 77]"],
        "exclude_token_ids [77] are outside the model's vocabulary",
    ),
    # Text, and nothing to tokenise it with.
    ("text.txt", [TEXT, "tlens_model_path=no_tokenizer"], "the model brings no tokenizer: set tokenizer_name"),
    (
        "text.txt",
        [TEXT, "train_data.tokenizer_name=empty_folder"],
        "cannot be loaded: expected tokenizer.json in that folder",
    ),
    ("text.txt", [TEXT, "train_data.tokenizer_name=no_such"], "tokenizer 'no_such' cannot be loaded"),
    # The hub, which tests cannot reach.
    ("no_such_dataset", [], "data set 'no_such_dataset' is no local file or folder, and the hub cannot be reached"),
]


@pytest.mark.parametrize(("name", "overrides", "words"), CASES, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_data_that_cannot_be_trained_on_are_refused(
    bench: Bench, refused: Callable[..., str], name: str, overrides: list[str], words: str
) -> None:
    message = refused("train", bench.config, *bench.sets([f"train_data.dataset_name={name}", *overrides]))
    assert words.replace("FOLDER", str(bench.folder)) in message


def test_evaluation_data_are_checked_before_training(bench: Bench, refused: Callable[..., str]) -> None:
    overrides = ["train_data.holdout_fraction=null", "eval_data={dataset_name: ragged.parquet, n_ctx: 8}"]
    assert "row 1 of" in refused("train", bench.config, *bench.sets(overrides))
