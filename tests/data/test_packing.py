import itertools

import numpy as np
import pytest

from e2e_sae.data.packing import cut_rows, encode_documents
from e2e_sae.errors import UserError
from tests.data.word_tokenizer import BOS, EOS, text_of, word_tokenizer


def test_each_document_is_followed_by_eos():
    pieces = list(encode_documents([text_of(5, 6), text_of(7)], word_tokenizer()))
    assert [piece.tolist() for piece in pieces] == [[5, 6, EOS], [7, EOS]]


def test_bos_separates_documents_where_there_is_no_eos():
    assert next(encode_documents([text_of(5)], word_tokenizer(eos=False))).tolist() == [5, BOS]


def test_a_tokenizer_with_neither_is_refused():
    with pytest.raises(UserError, match="neither an EOS nor a BOS"):
        list(encode_documents([text_of(5)], word_tokenizer(bos=False, eos=False)))


def test_many_documents_are_encoded_as_each_alone():
    texts = [text_of(2 + i % 900) for i in range(2500)]
    together = [piece.tolist() for piece in encode_documents(texts, word_tokenizer())]
    assert together == [[2 + i % 900, EOS] for i in range(2500)]


@pytest.mark.parametrize("bos_id", [None, BOS])
@pytest.mark.parametrize("n_ctx", [2, 3, 7])
def test_concatenated_rows_give_back_the_stream_but_for_an_incomplete_row(n_ctx: int, bos_id: int | None):
    lengths = [1, 0, 9, 2, 30, 4]
    numbers = itertools.count(10)
    pieces = [np.array([next(numbers) for _ in range(n)], dtype=np.int64) for n in lengths]
    rows = list(cut_rows(pieces, n_ctx, bos_id))
    stream = np.concatenate(pieces).tolist()
    width = n_ctx if bos_id is None else n_ctx - 1
    texts = [row.tolist() if bos_id is None else row.tolist()[1:] for row in rows]
    assert all(len(row) == n_ctx and (bos_id is None or row[0] == bos_id) for row in rows)
    assert list(itertools.chain(*texts)) == stream[: len(stream) // width * width]


def test_a_row_of_nothing_but_bos_is_refused():
    with pytest.raises(UserError, match="n_ctx=1 leaves no room"):
        list(cut_rows([np.arange(5)], 1, BOS))
