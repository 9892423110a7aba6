"""Threads of torch's operators, for whatever runs on torch."""

from __future__ import annotations

import functools
import logging
import sys

from mlserver_hftasks.settings import Settings

logger = logging.getLogger("mlserver.hftasks")


def set_torch_threads(settings: Settings) -> None:
    """Threads of one operator for the calling thread, and once per process between operators.

    Without torch, which a program of ONNX Runtime or OpenVINO does without, there is nothing to set.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return
    # models of one process take turns on its event loop's thread: what another has set must not stay
    own = _own_threads()
    threads = settings.intra_op_threads or own
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if settings.inter_op_threads is not None:
        _set_inter_op_threads(settings.inter_op_threads)


@functools.cache
def _own_threads() -> int:
    """What torch takes by itself; first asked before any number is set."""
    threads: int = sys.modules["torch"].get_num_threads()
    return threads


@functools.cache
def _set_inter_op_threads(threads: int) -> None:
    """Once per number: torch takes it once per process, and the warning is said once."""
    torch = sys.modules["torch"]
    if torch.get_num_interop_threads() == threads:
        return
    try:
        torch.set_num_interop_threads(threads)
    except RuntimeError:
        logger.warning(
            "inter_op_threads is set once per process; it stays %d", torch.get_num_interop_threads()
        )
