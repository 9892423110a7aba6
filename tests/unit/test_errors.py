"""What is told of the errors of others."""

from __future__ import annotations

import pytest

from mlserver_hftasks.errors import first_line


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("one\ntwo"), "one"),
        (NotImplementedError(), "NotImplementedError"),
        (ValueError(" \n "), "ValueError"),
        (ValueError("x" * 999), "x" * 200),
    ],
)
def test_the_first_line(error: Exception, told: str) -> None:
    assert first_line(error) == told
