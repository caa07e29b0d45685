"""Work in several threads that ends well: what is under way is finished when the rest is given up."""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_threads(work: Callable[[T], R], items: Sequence[T], n_threads: int, halt: Callable[[], object]) -> list[R]:
    """Returns what `work` makes of each item, in their order.

    What one thread raises is raised here, after `halt` was called and the other threads have ended. Only a
    `KeyboardInterrupt` waits for nobody: the threads then end with the program.

    Args:
        work: called in the threads; is to raise soon once it was halted.
        items: what is to be done.
        n_threads: how many at a time.
        halt: tells the others to give up.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, R] | BaseException] = queue.SimpleQueue()
    for n in range(len(items)):
        todo.put(n)

    def worker() -> None:
        try:
            while True:
                try:
                    n = todo.get_nowait()
                except queue.Empty:
                    return
                done.put((n, work(items[n])))
        except BaseException as error:  # the main thread raises it
            done.put(error)

    threads = [threading.Thread(target=worker, daemon=True) for _ in range(min(n_threads, len(items)))]
    for thread in threads:
        thread.start()
    results: dict[int, R] = {}
    while len(results) < len(items):
        one = done.get()
        if isinstance(one, BaseException):
            halt()
            for thread in threads:
                thread.join()
            raise one
        results[one[0]] = one[1]
    return [results[n] for n in range(len(items))]
