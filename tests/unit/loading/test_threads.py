"""Models of one process take turns on one thread, each with its own number of torch's threads."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from mlserver_hftasks.loading import threads
from mlserver_hftasks.loading.threads import set_torch_threads
from mlserver_hftasks.settings import Settings


@pytest.fixture(autouse=True)
def _number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_model_that_sets_no_number_gets_torchs_own_after_one_that_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "_own_threads", lambda: 2)
    set_torch_threads(Settings(intra_op_threads=1))
    assert torch.get_num_threads() == 1
    set_torch_threads(Settings())
    assert torch.get_num_threads() == 2


def test_what_cannot_be_set_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(number: int) -> None:
        raise RuntimeError

    monkeypatch.setattr(torch, "set_num_interop_threads", refuse)
    wanted = Settings(inter_op_threads=torch.get_num_interop_threads() + 3)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            set_torch_threads(wanted)
    assert len(caplog.records) == 1
