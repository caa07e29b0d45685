import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from e2e_sae.data.dataset_config import DatasetConfig
from e2e_sae.data.sources import TextSource, TokenStream, TokenTable, is_held_out, keep_part, open_source, part_indices
from e2e_sae.data.stdlib_corpus import stdlib_documents
from e2e_sae.errors import UserError

ROWS = [[1, 2, 3], [4, 5, 6]]
TEXTS = ["one", "two words"]


def write_parquet(path: Path, **columns: Any) -> None:
    parquet.write_table(pa.table(columns), path)


def write_arrow_file(path: Path, **columns: Any) -> None:
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def write_arrow_stream(path: Path, **columns: Any) -> None:
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_jsonl(path: Path, **columns: Any) -> None:
    lines = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


WRITERS: list[tuple[Callable[..., None], str]] = [
    (write_parquet, "parquet"),
    (write_arrow_file, "arrow"),
    (write_arrow_stream, "arrow"),
    (write_jsonl, "jsonl"),
]


def tokens(path: Path, n_ctx: int = 3, **fields: Any) -> list[list[int]]:
    source = open_source(DatasetConfig(dataset_name=str(path), n_ctx=n_ctx, **fields))
    assert isinstance(source, TokenTable)
    return np.asarray(source.rows).tolist()


def texts(path: Path, **fields: Any) -> list[str]:
    source = open_source(DatasetConfig(dataset_name=str(path), n_ctx=3, is_tokenized=False, **fields))
    assert isinstance(source, TextSource)
    assert list(source.read()) == list(source.read()), "reading begins anew"
    return list(source.read())


def read_all(config: DatasetConfig) -> None:
    source = open_source(config)
    if isinstance(source, TextSource):
        list(source.read())


def problem(path: Path, n_ctx: int = 3, **fields: Any) -> str:
    """The message of what is wrong with reading `path`."""
    config = DatasetConfig(dataset_name=str(path), n_ctx=n_ctx, **fields)
    with pytest.raises(UserError) as error:
        read_all(config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_a_table_gives_its_token_rows(write: Callable[..., None], suffix: str, tmp_path: Path):
    write(tmp_path / f"x.{suffix}", input_ids=ROWS)
    assert tokens(tmp_path / f"x.{suffix}") == ROWS


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_a_table_gives_its_texts(write: Callable[..., None], suffix: str, tmp_path: Path):
    write(tmp_path / f"x.{suffix}", other=[1, 2], story=TEXTS)
    assert texts(tmp_path / f"x.{suffix}", column_name="story") == TEXTS


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_raw_text_falls_back_to_the_text_column(write: Callable[..., None], suffix: str, tmp_path: Path):
    write(tmp_path / f"x.{suffix}", text=TEXTS)
    assert texts(tmp_path / f"x.{suffix}") == TEXTS


def test_a_folders_files_come_in_the_order_of_their_paths(tmp_path: Path):
    write_parquet(tmp_path / "b.parquet", input_ids=[[4, 5, 6]])
    write_parquet(tmp_path / "a.parquet", input_ids=[[1, 2, 3]])
    (tmp_path / "dataset_info.json").write_text("{}")
    assert tokens(tmp_path) == ROWS


def test_data_files_choose_files_of_a_folder(tmp_path: Path):
    for i, name in enumerate(["train-0.parquet", "train-1.parquet", "test-0.parquet"]):
        write_parquet(tmp_path / name, input_ids=[[i, i, i]])
    assert tokens(tmp_path, data_files=["train-*.parquet"]) == [[0, 0, 0], [1, 1, 1]]


def test_text_files_split_at_endoftext_and_else_hold_one_document_each(tmp_path: Path):
    (tmp_path / "1.txt").write_text("first\nstory<|endoftext|>second<|endoftext|>\n")
    (tmp_path / "2.txt").write_text("third")
    assert texts(tmp_path) == ["first\nstory", "second", "third"]


@pytest.mark.parametrize(("suffix", "dtype"), [("u16", "<u2"), ("u32", "<u4")])
def test_flat_token_files_are_cut_into_rows(suffix: str, dtype: str, tmp_path: Path):
    (tmp_path / f"x.{suffix}").write_bytes(np.array([1, 2, 3, 4, 5, 60000, 7], dtype=dtype).tobytes())
    assert tokens(tmp_path / f"x.{suffix}") == [[1, 2, 3], [4, 5, 60000]]


def test_flat_token_files_of_a_folder_are_one_stream(tmp_path: Path):
    (tmp_path / "1.u16").write_bytes(np.array([1, 2], dtype="<u2").tobytes())
    (tmp_path / "2.u16").write_bytes(np.array([3, 4, 5, 6], dtype="<u2").tobytes())
    assert tokens(tmp_path) == ROWS


def test_the_stdlib_corpus_has_its_own_splits():
    config = DatasetConfig(dataset_name="stdlib", split="eval", is_tokenized=False, n_ctx=8)
    source = open_source(config)
    assert isinstance(source, TextSource)
    assert next(source.read()) == stdlib_documents("eval")[0].text


@pytest.mark.filterwarnings("ignore")  # `datasets` warns in its own way
@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_dataset_gives_tokens_and_texts(streaming: bool, tmp_path: Path):
    # `json` is a builder that `datasets` knows without the network; it takes the same path as a hub name.
    path = tmp_path / "x.jsonl"
    write_jsonl(path, input_ids=ROWS, text=TEXTS)
    fields: dict[str, Any] = {"dataset_name": "json", "data_files": [str(path)], "streaming": streaming, "n_ctx": 3}
    source = open_source(DatasetConfig(**fields))
    if streaming:
        assert isinstance(source, TokenStream)
        assert [row.tolist() for row in source.read()] == ROWS
    else:
        assert isinstance(source, TokenTable)
        assert source.rows[np.array([1, 0])].tolist() == [ROWS[1], ROWS[0]]
    text = open_source(DatasetConfig(**fields, is_tokenized=False, column_name="text"))
    assert isinstance(text, TextSource)
    assert text.is_streamed == streaming
    assert list(text.read()) == TEXTS
    with pytest.raises(UserError, match="no column 'txt' in 'json' .columns: input_ids, text.*'text'"):
        open_source(DatasetConfig(**fields, is_tokenized=False, column_name="txt"))
    wrong = open_source(DatasetConfig(**fields, is_tokenized=False, column_name="input_ids"))
    assert isinstance(wrong, TextSource)
    with pytest.raises(UserError, match="holds token ids, but is_tokenized is false"):
        list(wrong.read())


@pytest.mark.filterwarnings("ignore")
def test_a_hub_dataset_that_cannot_be_reached_is_one_line():
    with pytest.raises(UserError, match="data set 'nobody/nothing'") as error:
        open_source(DatasetConfig(dataset_name="nobody/nothing", n_ctx=3))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9, 1 / 3])
def test_held_out_and_kept_items_part_the_data_in_the_given_share(fraction: float):
    items = list(range(1000))
    train, held_out = list(keep_part(items, "train", fraction)), list(keep_part(items, "eval", fraction))
    assert sorted(train + held_out) == items
    assert abs(len(held_out) - 1000 * fraction) <= 1
    assert list(keep_part(items, "all", fraction)) == items
    assert part_indices(1000, "eval", fraction).tolist() == held_out


def test_one_in_ten_held_out_is_each_tenth():
    assert [i for i in range(40) if is_held_out(i, 0.1)] == [9, 19, 29, 39]


# --- what can be wrong ---


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_a_wrong_column_lists_the_columns(write: Callable[..., None], suffix: str, tmp_path: Path):
    path = tmp_path / f"x.{suffix}"
    write(path, input_ids=ROWS, text=TEXTS)
    assert "(columns: input_ids, text)" in problem(path, column_name="tokens")
    message = problem(path, column_name="texts", is_tokenized=False)
    assert "no column 'texts'" in message
    assert "Did you mean 'text'?" in message


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_rows_of_another_length_give_both_lengths(write: Callable[..., None], suffix: str, tmp_path: Path):
    write(tmp_path / f"x.{suffix}", input_ids=[[1, 2, 3], [4, 5]])
    assert "row 1 of" in problem(tmp_path / f"x.{suffix}")
    assert "has 2 tokens, n_ctx is 3" in problem(tmp_path / f"x.{suffix}")


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_text_said_to_be_tokens_is_refused(write: Callable[..., None], suffix: str, tmp_path: Path):
    write(tmp_path / f"x.{suffix}", text=TEXTS)
    assert "holds text, not token ids: set is_tokenized: false" in problem(tmp_path / f"x.{suffix}", column_name="text")


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_tokens_said_to_be_text_are_refused(write: Callable[..., None], suffix: str, tmp_path: Path):
    write(tmp_path / f"x.{suffix}", input_ids=ROWS)
    assert "holds token ids, but is_tokenized is false" in problem(tmp_path / f"x.{suffix}", is_tokenized=False)


def test_numbers_are_neither_text_nor_token_rows(tmp_path: Path):
    write_parquet(tmp_path / "x.parquet", input_ids=[1, 2], score=[[0.5], [1.5]])
    assert "holds no lists of token ids" in problem(tmp_path / "x.parquet")
    assert "holds no lists of token ids" in problem(tmp_path / "x.parquet", column_name="score", n_ctx=1)
    assert "holds no text (found int)" in problem(tmp_path / "x.parquet", is_tokenized=False)


def test_text_and_flat_files_cannot_be_the_other_thing(tmp_path: Path):
    (tmp_path / "x.txt").write_text("hello")
    (tmp_path / "x.u16").write_bytes(b"\1\0")
    assert "is text: set is_tokenized: false" in problem(tmp_path / "x.txt")
    assert "holds token ids, but is_tokenized is false" in problem(tmp_path / "x.u16", is_tokenized=False)


def test_the_stdlib_corpus_is_text_with_three_splits():
    config = DatasetConfig(dataset_name="stdlib", n_ctx=3)
    with pytest.raises(UserError, match="is text: set is_tokenized: false"):
        open_source(config)
    with pytest.raises(UserError, match="has the splits train, eval and all .given: 'test'"):
        open_source(config.model_copy(update={"is_tokenized": False, "split": "test"}))


def test_a_flat_file_of_an_odd_size_is_refused(tmp_path: Path):
    (tmp_path / "x.u16").write_bytes(b"\1\2\3")
    (tmp_path / "x.u32").write_bytes(b"\1\2\3\4\5\6")
    assert "has 3 bytes, no multiple of 2" in problem(tmp_path / "x.u16")
    assert "has 6 bytes, no multiple of 4" in problem(tmp_path / "x.u32")


def test_unknown_mixed_and_missing_files_are_named(tmp_path: Path):
    (tmp_path / "x.csv").write_text("a,b")
    assert "unknown kind '.csv': expected one of .parquet" in problem(tmp_path / "x.csv")
    assert "no data files in" in problem(tmp_path)
    (tmp_path / "x.txt").write_text("a")
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    assert "files of several kinds (.jsonl, .txt): choose with data_files" in problem(tmp_path)
    assert "data_files '*.parquet' matches no file" in problem(tmp_path, data_files="*.parquet")
    assert "is a file: name its folder" in problem(tmp_path / "x.txt", data_files="*.txt")


def test_damaged_files_are_named(tmp_path: Path):
    for name in ("x.parquet", "x.arrow"):
        (tmp_path / name).write_bytes(b"not a table at all")
        assert f"{name}' is no readable" in problem(tmp_path / name)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert "line 2 of" in problem(tmp_path / "x.jsonl", is_tokenized=False)
    (tmp_path / "y.jsonl").write_text("[1, 2]\n")
    assert "line 1 of" in problem(tmp_path / "y.jsonl")
    assert "no JSON object" in problem(tmp_path / "y.jsonl")
    (tmp_path / "x.txt").write_bytes(b"ab\xff")
    assert "not a UTF-8 text file (byte 2)" in problem(tmp_path / "x.txt", is_tokenized=False)


def test_a_column_missing_from_one_json_line_names_the_line(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    message = problem(tmp_path / "x.jsonl", is_tokenized=False)
    assert "no column 'text' in" in message
    assert "line 2' (columns: body)" in message
