"""What a data set is: where it comes from, which column, how it becomes rows of `n_ctx` token ids."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from e2e_sae.base_config import BaseConfig
from e2e_sae.types import LocalOrHub, StrOrList

STDLIB_DATASET = "stdlib"
"""`dataset_name` of the embedded corpus: the standard library of the running Python (`stdlib_corpus.py`)."""


class DatasetConfig(BaseConfig):
    """A source of token rows. The paper's library's keys come first; the rest is new."""

    dataset_name: LocalOrHub
    """An existing local file or folder (parquet, jsonl, arrow, txt, u16, u32), `stdlib`, or a hub dataset."""
    is_tokenized: bool = True
    """True: `column_name` holds rows of `n_ctx` token ids. False: it holds text."""
    tokenizer_name: LocalOrHub | None = None
    """A tokenizer folder or hub name; needed for text only. Left out, the model's own is used."""
    streaming: bool = True
    """Hub datasets only: read while training, without downloading everything first."""
    split: str = "train"
    """The split of a hub dataset; `train` or `eval` of the `stdlib` corpus; unused for local files."""
    n_ctx: PositiveInt
    """Tokens in one sample, a BOS included."""
    seed: NonNegativeInt | None = None
    """Shuffle seed; null: the run's seed (evaluation: the run's seed + 42)."""
    column_name: str = "input_ids"
    """Column with the token ids or the text. If raw text has no such column, `text` is used."""
    name: str | None = None
    """Configuration name of a hub dataset."""
    revision: str | None = None
    """Git revision of a hub dataset."""
    data_files: StrOrList | None = None
    """Files inside a hub dataset or a local folder; shell patterns are allowed."""
    shuffle: bool = True
    """False: the file's own order."""
    add_bos: bool | None = None
    """Raw text: put the tokenizer's BOS before every row. Null: yes if the tokenizer has one."""
    exclude_token_ids: list[NonNegativeInt] = []
    """Positions holding one of these ids are left out of losses and metrics (the SAE still sees them)."""
    holdout_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Training data only: this share of the documents (rows, if tokenised) is kept for evaluation."""
    n_epochs: PositiveInt = 1
    """Passes over the data; each is shuffled anew."""
