"""Work of an iterator done ahead, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")


def ahead(make: Callable[[], Iterator[Item]], depth: int = 1) -> Generator[Item, None, None]:
    """What `make()` yields, made in a thread that is at most `depth` finished items ahead.

    An exception there is raised here, in its place. The thread ends when this iterator does, or is closed.
    """
    items: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(done: bool, value: Any) -> None:
        while not stop.is_set():
            try:
                items.put((done, value), timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        source = make()
        try:
            for item in source:
                put(False, item)
                if stop.is_set():
                    break
            put(True, None)
        except BaseException as error:  # raised again by the one who waits for it
            put(True, error)
        finally:
            close = getattr(source, "close", None)
            if close:
                close()

    thread = threading.Thread(target=work, name="vtok-fast video", daemon=True)
    thread.start()
    try:
        while True:
            done, value = items.get()
            if not done:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        stop.set()
        thread.join()
