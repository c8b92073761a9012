"""Work on the host while a device computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def one_ahead(items: Iterable[Item], make: Callable[[Item], Made]) -> Iterator[tuple[Item, Made]]:
    """Each item with what `make` makes of it, which a thread does while the caller uses the item before. An exception of
    `make` is raised where its item would have come."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="one-ahead")
    try:
        before: tuple[Item, Future[Made]] | None = None
        for item in items:
            following = item, pool.submit(make, item)
            if before is not None:
                yield before[0], before[1].result()
            before = following
        if before is not None:
            yield before[0], before[1].result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
