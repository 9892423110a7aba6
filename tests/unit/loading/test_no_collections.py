"""No garbage collection while a model is loaded, and as before afterwards."""

from __future__ import annotations

import gc

import pytest

from mlserver_hftasks.loading import memory


def test_collections_pause_and_come_back_even_after_an_error() -> None:
    assert gc.isenabled()
    with pytest.raises(RuntimeError), memory.without_collections():
        assert not gc.isenabled()
        raise RuntimeError
    assert gc.isenabled()


def test_who_has_switched_them_off_keeps_them_off() -> None:
    gc.disable()
    try:
        with memory.without_collections():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
