"""Threads of torch's operators, for whatever runs on torch."""

from __future__ import annotations

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
    if settings.intra_op_threads is not None:
        torch.set_num_threads(settings.intra_op_threads)
    if settings.inter_op_threads is not None and torch.get_num_interop_threads() != settings.inter_op_threads:
        try:
            torch.set_num_interop_threads(settings.inter_op_threads)
        except RuntimeError:
            logger.warning(
                "inter_op_threads is set once per process; it stays %d", torch.get_num_interop_threads()
            )
