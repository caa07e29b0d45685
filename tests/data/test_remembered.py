from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
from numpy import ndarray

from e2e_sae.data.batches import RowOrder, StreamedBatches
from e2e_sae.data.remembered import RememberedRows


class Stream:
    """Ten rows of four tokens; counts how many were read."""

    def __init__(self) -> None:
        self.n_read = 0

    def __call__(self) -> Iterator[ndarray]:
        for i in range(10):
            self.n_read += 1
            yield np.arange(4 * i, 4 * i + 4)


def first_tokens(rows: Iterator[ndarray]) -> list[int]:
    return [int(row[0]) for row in rows]


@pytest.mark.parametrize("max_tokens", [0, 3, 4, 13, 40, 1000])
@pytest.mark.parametrize("n_first", [0, 3, 10, 11])
def test_every_call_gives_every_row_in_order(max_tokens: int, n_first: int) -> None:
    remembered = RememberedRows(Stream(), max_tokens)
    assert first_tokens(islice(remembered(), n_first)) == list(range(0, 40, 4))[:n_first]
    for _ in range(3):
        assert first_tokens(remembered()) == list(range(0, 40, 4))


def test_what_fits_is_read_once() -> None:
    stream = Stream()
    remembered = RememberedRows(stream, 40)
    for _ in range(3):
        assert len(list(remembered())) == 10
        assert stream.n_read == 10


def test_the_beginning_is_read_once_though_the_rest_never_was() -> None:
    stream = Stream()
    remembered = RememberedRows(stream, 40)
    for _ in range(3):
        assert len(list(islice(remembered(), 4))) == 4
        assert stream.n_read == 4


def test_no_more_is_kept_than_allowed_and_the_rest_is_read_again() -> None:
    stream = Stream()
    remembered = RememberedRows(stream, 4 * 6 + 3)
    list(remembered())
    assert len(list(islice(remembered(), 6))) == 6
    assert stream.n_read == 10
    assert len(list(islice(remembered(), 7))) == 7
    assert stream.n_read == 17


def test_two_readers_in_turns_see_every_row() -> None:
    remembered = RememberedRows(Stream(), 40)
    a, b = remembered(), remembered()
    seen_a, seen_b = [next(a), next(a)], [next(b) for _ in range(5)]
    assert first_tokens(iter([*seen_a, *a])) == first_tokens(iter([*seen_b, *b])) == list(range(0, 40, 4))
    assert first_tokens(remembered()) == list(range(0, 40, 4))


def test_a_stream_is_read_once_for_all_its_epochs_and_evaluations() -> None:
    stream = Stream()
    batches = StreamedBatches(stream, 4, RowOrder(n_epochs=3))
    found = [[batch.tolist() for batch in batches.iterate(4)] for _ in range(2)]
    assert stream.n_read == 10
    assert found[0] == found[1]
    epochs = [row[0] for batch in found[0] for row in batch]
    assert sorted(epochs[:10]) == sorted(epochs[10:20]) == sorted(epochs[20:]) == list(range(0, 40, 4))
    assert epochs[:10] != epochs[10:20]
