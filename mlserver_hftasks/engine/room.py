"""Whether a queue, which is bounded in rows and in tokens, has room for more."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mlserver_hftasks.errors import Overloaded, RequestTooLarge


def check_room(bounds: Iterable[tuple[str, int, int, int]], retry_after_s: Callable[[], float]) -> None:
    """Each bound: what it counts, how many wait, how many come, how many may.

    Raises `RequestTooLarge` for what no queue of that size could take, `Overloaded` for what this one
    cannot take now.
    """
    for what, queued, new, limit in bounds:
        if new > limit:
            raise RequestTooLarge(
                f"the request brings {new} {what}, expected at most {limit} @ max_queue_{what}"
            )
        if queued + new > limit:
            raise Overloaded(
                f"the queue is full: {queued} {what} wait and the request brings {new}, "
                f"expected at most {limit} together @ max_queue_{what}",
                retry_after_s=retry_after_s(),
            )
