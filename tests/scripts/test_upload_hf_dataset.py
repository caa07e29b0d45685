"""`upload_hf_dataset.py`: text in, shuffled token rows out, as our loader and `datasets` read them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from e2e_sae import token_dataset
from e2e_sae.data.batches import load_token_batches
from e2e_sae.data.dataset_config import DatasetConfig
from e2e_sae.errors import UserError
from e2e_sae.scripts.upload_hf_dataset import main
from e2e_sae.token_dataset import default_repo_id, push_token_dataset
from tests.tiny_models import CHARACTERS, make_tokenizer
from tests.tiny_runs import files_in

DOCUMENTS = ["the quick brown fox", "jumps", "over the lazy dog " * 9, "a b c d e f g h i j"] * 3
N_CTX = 8


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    return path


def packed_by_hand(n_ctx: int, bos: bool = False) -> list[list[int]]:
    """Returns the rows in the order of the text: a character is its place in the alphabet + 1, 0 ends a document."""
    ids: list[int] = []
    for document in DOCUMENTS:
        ids += [CHARACTERS.index(character) + 1 for character in document] + [0]
    width = n_ctx - bos
    return [[0] * bos + ids[i : i + width] for i in range(0, len(ids) - width + 1, width)]


def rows_in(folder: Path) -> list[list[int]]:
    return [row for path in sorted(folder.iterdir()) for row in parquet.read_table(path)["input_ids"].to_pylist()]


def run(*argv: Any) -> int:
    return main([str(argument) for argument in argv])


@pytest.mark.parametrize("bos", [False, True])
def test_the_rows_are_those_packed_by_hand_in_another_order(
    tmp_path: Path, text: Path, tokenizer: Path, bos: bool
) -> None:
    out = tmp_path / "out"
    arguments = ["--n-ctx", N_CTX, "--out", out, *(["--add-bos"] if bos else [])]
    assert run(text, "--tokenizer", tokenizer, *arguments) == 0
    assert [path.name for path in out.iterdir()] == ["train-00000-of-00001.parquet"]
    rows, expected = rows_in(out), packed_by_hand(N_CTX, bos)
    assert sorted(rows) == sorted(expected)
    assert rows != expected


def test_our_loader_and_the_datasets_library_read_what_was_saved(tmp_path: Path, text: Path, tokenizer: Path) -> None:
    import datasets

    out = tmp_path / "out"
    assert run(text, "--tokenizer", tokenizer, "--n-ctx", N_CTX, "--out", out) == 0
    config = DatasetConfig(dataset_name=str(out), n_ctx=N_CTX, shuffle=False)
    batches = load_token_batches(config, global_seed=0)
    assert batches.n_samples == len(packed_by_hand(N_CTX))
    assert [row for batch in batches.iterate(4) for row in batch.tolist()] == rows_in(out)
    loaded: Any = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["input_ids"][:] == rows_in(out)


def test_the_seed_decides_the_order(tmp_path: Path, text: Path, tokenizer: Path) -> None:
    orders = {}
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        assert run(text, "--tokenizer", tokenizer, "--n-ctx", 4, "--seed", seed, "--out", tmp_path / name) == 0
        orders[name] = rows_in(tmp_path / name)
    assert orders["a"] == orders["b"] != orders["c"]
    assert sorted(orders["a"]) == sorted(orders["c"])


def test_many_rows_become_several_files_of_many_chunks(
    tmp_path: Path, text: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_dataset, "_CHUNK_ROWS", 7)
    expected = packed_by_hand(4)
    monkeypatch.setattr(token_dataset, "SHARD_BYTES", -(-np.asarray(expected, np.int32).nbytes // 3))
    assert run(text, "--tokenizer", tokenizer, "--n-ctx", 4, "--split", "validation", "--out", tmp_path / "out") == 0
    assert sorted(files_in(tmp_path / "out")) == [f"validation-{i:05}-of-00003.parquet" for i in range(3)]
    assert sorted(rows_in(tmp_path / "out")) == sorted(expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to do: expected --out DIR, --push, or both"),
        (["--out", "tokenizer"], "is there already: name a new or an empty folder"),
        (["--out", "new", "--n-ctx", "9999"], "is too small:"),
        (["--out", "new", "--n-ctx", "0"], "config key 'n_ctx'"),
        (["--out", "new", "--seed", "-1"], "config key 'seed'"),
        (["--out", "new", "--column", "story"], "no column 'story' in"),
        (["--out", "new", "--push"], "cannot ask the Hugging Face hub who is logged in: "),
        (["--push", "me/rows"], "cannot ask the Hugging Face hub who is logged in: "),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    tmp_path: Path, text: Path, tokenizer: Path, arguments: list[str], words: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_real_one")
    before = files_in(tmp_path)
    assert run(text, "--tokenizer", tokenizer, *arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert words in message
    assert message.count("\n") == 1
    assert files_in(tmp_path) == before


def test_pushing_without_a_network_says_where_to_and_leaves_the_rows(
    tmp_path: Path, text: Path, tokenizer: Path
) -> None:
    out = tmp_path / "out"
    assert run(text, "--tokenizer", tokenizer, "--n-ctx", N_CTX, "--out", out) == 0
    before = files_in(out)
    with pytest.raises(UserError, match="cannot push to 'me/rows' on the Hugging Face hub: .*[Oo]ffline"):
        push_token_dataset(out, "me/rows", "train", private=True)
    assert files_in(out) == before


def test_names_are_those_of_the_published_data_sets(text: Path) -> None:
    def name(dataset: str, tokenizer: str, split: str = "train") -> str:
        config = DatasetConfig(dataset_name=dataset, tokenizer_name=tokenizer, split=split, n_ctx=8)
        return default_repo_id(config, "apollo-research")

    assert name("Skylion007/openwebtext", "gpt2") == "apollo-research/Skylion007-openwebtext-tokenizer-gpt2"
    assert (
        name("monology/pile-uncopyrighted", "EleutherAI/gpt-neox-20b")
        == "apollo-research/monology-pile-uncopyrighted-tokenizer-EleutherAI-gpt-neox-20b"
    )
    assert name("a/b", "gpt2", "validation") == "apollo-research/a-b-validation-tokenizer-gpt2"
    assert name(str(text), "gpt2") == "apollo-research/documents-tokenizer-gpt2"
