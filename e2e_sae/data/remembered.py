"""A stream of rows that is read, and tokenised, once as far as memory goes: evaluations and epochs read it again."""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Integer
from numpy import ndarray

MAX_TOKENS = 2**23
"""Tokens that are kept: 64 MB."""


class RememberedRows:
    """Each call yields the rows of `read` from the first on; those at the beginning are kept as they first come.

    What lies beyond is read again each time, and then what comes before it too.
    """

    def __init__(self, read: Callable[[], Iterator[Integer[ndarray, " n_ctx"]]], max_tokens: int = MAX_TOKENS) -> None:
        """
        Args:
            read: begins at the first row with each call; always the same rows.
            max_tokens: how many are kept at most.
        """
        self._read = read
        self._max_tokens = max_tokens
        self._kept: list[Integer[ndarray, " n_ctx"]] = []
        self._is_whole = False

    def __call__(self) -> Iterator[Integer[ndarray, " n_ctx"]]:
        n = 0
        while n < len(self._kept):
            yield self._kept[n]
            n += 1
        if self._is_whole:
            return
        i = -1
        for i, row in enumerate(self._read()):
            if i < n:
                continue
            if i == len(self._kept) and (i + 1) * len(row) <= self._max_tokens:
                self._kept.append(row.astype(np.int64))  # a copy: rows may be views of much more
            yield row
        self._is_whole = i + 1 == len(self._kept)
