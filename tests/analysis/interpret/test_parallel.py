"""Work in threads: order, and how it ends."""

import threading
import time

import pytest

from e2e_sae.analysis.interpret.parallel import in_threads


def test_results_come_in_the_order_of_the_items_and_at_most_so_many_at_a_time() -> None:
    busy: list[int] = []
    most: list[int] = []

    def work(n: int) -> int:
        busy.append(n)
        most.append(len(busy))
        time.sleep(0.01 if n % 2 else 0.002)
        busy.remove(n)
        return n * n

    assert in_threads(work, list(range(12)), 3, lambda: None) == [n * n for n in range(12)]
    assert max(most) == 3
    assert in_threads(work, [], 3, lambda: None) == []


def test_an_error_halts_the_others_which_finish_what_they_have_begun() -> None:
    halted, finished = threading.Event(), threading.Event()

    def work(n: int) -> int:
        if n == 1:
            raise ValueError("no more")
        assert halted.wait(10)
        finished.set()
        raise RuntimeError("halted")

    with pytest.raises(ValueError, match="no more"):
        in_threads(work, list(range(10)), 2, halted.set)
    assert finished.is_set()
