"""Everything that can go wrong on purpose, and the status a client sees for it.

    HFTasksError                500  INTERNAL
    ├── InvalidSettings         the model does not load; the message says which key and what is right
    ├── InvalidRequest          400  INVALID_ARGUMENT
    │   └── RequestTooLarge     413  INVALID_ARGUMENT
    ├── Overloaded              429  RESOURCE_EXHAUSTED, with the seconds after which to try again
    ├── DeadlineExceeded        504  DEADLINE_EXCEEDED
    ├── Unavailable             503  UNAVAILABLE
    └── ForwardFailed           500  INTERNAL

Messages have the form `what is wrong, what was expected @ where`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class HFTasksError(Exception):
    """Root of the tree; `status_code` is the HTTP status."""

    status_code: ClassVar[int] = 500


class InvalidSettings(HFTasksError):
    """`parameters.extra`, an environment variable or the model's own files cannot be served."""


class InvalidRequest(HFTasksError):
    """What the client sent is wrong."""

    status_code = 400


class RequestTooLarge(InvalidRequest):
    """What the client sent is over a limit of size."""

    status_code = 413


class Overloaded(HFTasksError):
    """The queue is full, or the wait would break the latency target."""

    status_code = 429

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(HFTasksError):
    """The request's `timeout_ms` passed before its answer was ready."""

    status_code = 504


class Unavailable(HFTasksError):
    """The model is being unloaded."""

    status_code = 503


class ForwardFailed(HFTasksError):
    """The model itself raised on this request's rows."""


def first_line(error: BaseException) -> str:
    """What an error of another's says, in short; the name of its class where it says nothing."""
    text = str(error).strip() or type(error).__name__
    return f"{text.splitlines()[0]:.200}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`, did you mean 'top_k'?` for the nearest of the known names; else the list of them."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if nearest:
        return f"did you mean '{nearest[0]}'?"
    return f"expected one of {', '.join(names)}" if names else "none is accepted here"
