import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from e2e_sae.acts import TokenBatch
from e2e_sae.data import prefetch
from e2e_sae.data.dataset_config import DatasetConfig
from e2e_sae.data.prefetch import DataWait, Prefetched, on_device
from e2e_sae.errors import UserError

CPU = torch.device("cpu")
in_thread_or_not = pytest.mark.parametrize("are_instant", [True, False], ids=["no thread", "thread"])


def n_threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    assert n_threads() == 0
    yield
    assert n_threads() == 0


class Source:
    """Counts to `n`, then raises `error` if there is one; knows how far it is and whether it was closed."""

    def __init__(self, n: int, error: Exception | None = None) -> None:
        self.n, self.error = n, error
        self.n_made = 0
        self.is_closed = False
        self.thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[int]:
        self.thread = threading.current_thread()
        try:
            for i in range(self.n):
                self.n_made += 1
                yield i
            if self.error is not None:
                raise self.error
        finally:
            self.is_closed = True


def batches_of(n: int) -> list[TokenBatch]:
    tokens = torch.arange(8 * n).reshape(n, 2, 4)
    return [TokenBatch.of(rows, [3, 9, 10], start=2 * i) for i, rows in enumerate(tokens)]


# --- what comes out ---


@pytest.mark.parametrize("n_ahead", [1, 3, 100])
def test_every_item_comes_once_and_in_order(n_ahead: int) -> None:
    with Prefetched(Source(50), n_ahead) as items:
        assert list(items) == list(range(50))
        assert next(items, None) is None


def test_an_error_comes_as_it_is_after_the_items_before_it() -> None:
    error = UserError("row 2 holds no token ids")
    source = Source(2, error)
    with Prefetched(source) as items:
        assert [next(items), next(items)] == [0, 1]
        with pytest.raises(UserError) as caught:
            next(items)
        assert caught.value is error
        assert next(items, None) is None
    assert source.is_closed


@in_thread_or_not
@pytest.mark.parametrize("excluded", [True, False])
def test_batches_on_the_device_are_those_that_were_given(are_instant: bool, excluded: bool) -> None:
    given = batches_of(5) if excluded else [TokenBatch.of(batch.tokens) for batch in batches_of(5)]
    found = list(on_device(given, CPU, are_instant=are_instant))
    assert len(found) == 5
    for a, b in zip(found, given, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert (a.n_counted, a.start) == (b.n_counted, b.start)
        assert (a.counted is None) == (b.counted is None) == (not excluded)
        if a.counted is not None and b.counted is not None:
            assert torch.equal(a.counted, b.counted)


# --- the thread ---


def test_the_source_runs_in_a_thread_of_its_own_and_only_a_few_items_ahead() -> None:
    source = Source(100)
    with Prefetched(source, n_ahead=3) as items:
        assert source.n_made == 0
        for taken in range(1, 5):
            next(items)
            # Three are ready, and the source is asked for the next once there is room.
            assert source.n_made <= taken + 3 + 1
        assert source.thread not in (None, threading.main_thread())


@pytest.mark.parametrize("n_taken", [0, 1, 5])
def test_leaving_early_ends_the_thread_and_closes_the_source(n_taken: int) -> None:
    source = Source(1000)
    with Prefetched(source) as items:
        for _ in range(n_taken):
            next(items)
    assert n_threads() == 0
    assert source.is_closed == (n_taken > 0)
    assert source.n_made < 1000


def test_an_exception_of_the_consumer_ends_the_thread() -> None:
    source = Source(1000)
    with pytest.raises(KeyboardInterrupt), Prefetched(source) as items:  # noqa: PT012
        next(items)
        raise KeyboardInterrupt
    assert n_threads() == 0
    assert source.is_closed


def test_a_generator_that_is_closed_or_forgotten_ends_the_thread() -> None:
    for close in (True, False):
        batches = on_device(batches_of(100), CPU)
        next(iter(batches))
        assert n_threads() == 1
        if close:
            batches.close()
        del batches
        assert n_threads() == 0


def test_a_source_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "PATIENCE", 0.01)
    arrived = threading.Event()

    def stalled() -> Iterator[int]:
        yield 0
        arrived.wait()
        yield 1

    with Prefetched(stalled()) as items:
        assert next(items) == 0
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "prefetch")
    arrived.set()
    thread.join()
    assert next(items, None) is None


@pytest.mark.smoke
def test_a_program_that_ends_in_the_middle_does_not_hang() -> None:
    program = (
        "import itertools\n"
        "from e2e_sae.data.prefetch import Prefetched\n"
        "items = Prefetched(itertools.count())\n"
        "print(next(items), next(items))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == ("0 1\n", "")


# --- waiting ---


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(prefetch, "time", SimpleNamespace(perf_counter=clock))
    return clock


def test_the_share_is_the_time_that_batches_took_by_all_time_that_passed(clock: Clock) -> None:
    def slow() -> Iterator[TokenBatch]:
        for batch in batches_of(4):
            clock.now += 2
            yield batch

    wait = DataWait(CPU, started=clock.now)
    for _ in on_device(slow(), CPU, wait, are_instant=True):
        clock.now += 6
    assert wait.seconds == 8
    assert wait.elapsed == 32
    assert wait.share == 0.25


def test_what_is_ready_is_not_waited_for(clock: Clock) -> None:
    wait = DataWait(CPU, started=clock.now)
    for _ in on_device(batches_of(4), CPU, wait):
        clock.now += 6
    assert (wait.seconds, wait.share) == (0, 0)


@pytest.mark.parametrize(
    ("seconds", "is_tokenized", "said"),
    [
        (4.0, False, "waited for data 4.0% of the time"),
        (6.0, False, "waited for data 6.0% of the time: tokenise the text once"),
        (6.0, True, "waited for data 6.0% of the time: read the data from a local disk"),
    ],
)
def test_where_much_is_waited_it_says_what_to_do(clock: Clock, seconds: float, is_tokenized: bool, said: str) -> None:
    wait = DataWait(CPU, seconds, started=clock.now - 100)
    summary = wait.summary(DatasetConfig(dataset_name="somebody/web", n_ctx=8, is_tokenized=is_tokenized))
    assert summary.startswith(said)
    assert (summary == said) == (seconds == 4)


# --- a GPU ---


@pytest.mark.gpu
def test_batches_reach_a_gpu_without_anybody_waiting() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    given = batches_of(200)
    sums: list[torch.Tensor] = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in on_device(given, device):
            assert batch.counted is not None
            sums.append((batch.tokens * batch.counted).sum())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = [int((batch.tokens * batch.counted).sum()) for batch in given]  # pyright: ignore[reportOperatorIssue]
    assert [int(total) for total in sums] == expected
