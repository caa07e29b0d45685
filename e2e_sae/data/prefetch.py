"""The next batches are made while the model works on this one: a background thread reads, tokenises and copies ahead.

A thread, not processes: what takes long here (tokenizers, parquet, numpy, copying) releases the interpreter's lock. The
items are the same, in the same order, whatever the thread's timing: it draws on no global random generator.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from threading import Condition, Thread
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from e2e_sae.acts import TokenBatch
from e2e_sae.data.dataset_config import DatasetConfig

T = TypeVar("T")

N_AHEAD = 3
"""Items that are kept ready: a few, so that one slow item (a tokenizer's chunk, a shard to open) is made up for."""
MUCH = 0.05
"""Share of waiting from which on something should be done about it."""
PATIENCE = 5.0
"""Seconds that `close` waits for a source that does not return, such as a stalled download."""


@dataclass
class DataWait:
    """How long a device has had nothing to do because its data were not there yet."""

    device: torch.device
    """Where the data are used."""
    seconds: float = 0.0
    """In total."""
    started: float = field(default_factory=time.perf_counter)
    """When the loop began, by that clock."""

    @property
    def elapsed(self) -> float:
        """Seconds since the loop began."""
        return time.perf_counter() - self.started

    @property
    def share(self) -> float:
        """Share of the time since then that was waited."""
        return self.seconds / self.elapsed

    def summary(self, data: DatasetConfig) -> str:
        """Returns a sentence on it, with what to do where it is much."""
        said = f"waited for data {self.share:.1%} of the time"
        if self.share <= MUCH:
            return said
        if not data.is_tokenized:
            return (
                f"{said}: tokenise the text once (`python -m e2e_sae.scripts.upload_hf_dataset --help`) "
                "and train on what that writes"
            )
        return f"{said}: read the data from a local disk (train_data.streaming: false, or dataset_name: a folder)"

    def add(self, seconds: float) -> None:
        """Adds what the program has waited for an item that is there now."""
        # A GPU that has not finished with what it was given before has not waited; the program runs ahead of it.
        if self.device.type != "cuda" or torch.cuda.current_stream(self.device).query():
            self.seconds += seconds


def on_device(
    batches: Iterable[TokenBatch],
    device: torch.device,
    wait: DataWait | None = None,
    *,
    n_ahead: int = N_AHEAD,
    are_instant: bool = False,
) -> Generator[TokenBatch, None, None]:
    """Yields the batches on the device, made and copied there while the model works on the ones before.

    To a GPU they go from page-locked memory, in a stream of their own: neither the program nor the model waits for
    the copy. Where nothing is gained by it, there is no thread (found by trial: a batch from memory takes 10-35 us, and
    60 us by way of a thread). To be closed if it is left early.

    Args:
        batches: on the CPU.
        device: the model's.
        wait: told how long each batch was waited for.
        n_ahead: batches that are kept ready at most.
        are_instant: making one costs nothing to speak of.
    """
    wait = wait or DataWait(device)
    if device.type == "cuda":
        with Prefetched(_copied(batches, device), n_ahead) as ahead:
            for batch, copied in _timed(ahead, wait):
                used_in = torch.cuda.current_stream(device)
                used_in.wait_event(copied)
                for tensor in (batch.tokens, batch.counted):
                    if tensor is not None:
                        tensor.record_stream(used_in)  # its memory was taken in the other stream
                yield batch
        return
    moved = (_moved(batch, lambda x: x.to(device)) for batch in batches)
    if are_instant:
        yield from _timed(moved, wait)
        return
    with Prefetched(moved, n_ahead) as ahead:
        yield from _timed(ahead, wait)


def _timed(items: Iterable[T], wait: DataWait) -> Iterator[T]:
    iterator = iter(items)
    while True:
        started = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        wait.add(time.perf_counter() - started)
        yield item


def _copied(batches: Iterable[TokenBatch], device: torch.device) -> Iterator[tuple[TokenBatch, Any]]:
    """Yields each batch on the GPU, and the event of its arrival."""
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = _moved(batch, lambda x: x.pin_memory().to(device, non_blocking=True))
        yield moved, stream.record_event()


def _moved(batch: TokenBatch, move: Callable[[Tensor], Tensor]) -> TokenBatch:
    return replace(batch, tokens=move(batch.tokens), counted=None if batch.counted is None else move(batch.counted))


class Prefetched(Generic[T]):
    """Iterates over `items` in a background thread that starts with the first `next` and ends with `close`.

    An exception of the source is raised, as it is, where its item would have come. To be used in a `with` block: the
    thread is gone when that is left, and the source, if it is a generator, is closed.
    """

    def __init__(self, items: Iterable[T], n_ahead: int = N_AHEAD) -> None:
        """
        Args:
            items: used in the thread only.
            n_ahead: items that are kept ready at most.
        """
        self._items = items
        self._n_ahead = n_ahead
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._is_done = False
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> "Prefetched[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._thread.ident is None and not self._is_done:
            self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._is_done)
            if self._ready:
                item = self._ready.popleft()
                self._changed.notify_all()
                return item
        error, self._error = self._error, None
        raise StopIteration if error is None else error

    def close(self) -> None:
        """Ends the thread, whatever is left; `next` then ends too."""
        with self._changed:
            self._is_done = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(PATIENCE)

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            iterator = iter(self._items)
            try:
                for item in iterator:
                    if not self._put(item):
                        break
            finally:
                if hasattr(iterator, "close"):
                    iterator.close()  # pyright: ignore[reportAttributeAccessIssue]
        except BaseException as raised:  # raised again where it is waited for
            error = raised
        with self._changed:
            self._error = None if self._is_done else error
            self._is_done = True
            self._changed.notify_all()

    def _put(self, item: T) -> bool:
        """Waits for room and says whether the item is wanted."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < self._n_ahead or self._is_done)
            if not self._is_done:
                self._ready.append(item)
                self._changed.notify_all()
            return not self._is_done
