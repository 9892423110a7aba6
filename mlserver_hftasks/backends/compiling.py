"""`torch.compile` of a packed backbone: few programs, all of them made while the model loads.

Attention within sequences stays outside (`torch.compiler.disable`): it loops over lengths that no two
batches share. What lies between is compiled for any number of tokens. A program for each number would be
made while clients wait.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AttentionInterface

from mlserver_hftasks.backends.varlen import varlen_attention
from mlserver_hftasks.engine.rows import Row
from mlserver_hftasks.errors import InvalidSettings

logger = logging.getLogger("mlserver.hftasks")

ATTENTION_NAME = "hftasks_varlen_opaque"
WHERE = "@ parameters.extra.compile"


def outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, left as it is wherever a program calls it."""
    left: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]  # torch's
    return left


AttentionInterface.register(ATTENTION_NAME, outside(varlen_attention))


def compiled(forward: Callable[..., Any], backend: str, mode: str | None) -> Callable[..., Any]:
    """The function, compiled at its first calls. Raises `InvalidSettings` for what torch does not know."""
    known = torch._dynamo.list_backends(exclude_tags=None)
    if backend not in known:
        raise InvalidSettings(f"got {backend!r}, expected one of {', '.join(sorted(known))} {WHERE}.backend")
    if mode is not None and backend != "inductor":
        raise InvalidSettings(f'got {mode!r}, expected no mode, or the backend "inductor" {WHERE}.mode')
    # With any number of tokens, CUDA graphs would be recorded anew and kept for each.
    torch._inductor.config.triton.cudagraph_skip_dynamic_graphs = True
    options: dict[str, Any] = {"mode": mode} if backend == "inductor" else {}
    program: Callable[..., Any] = torch.compile(forward, backend=backend, dynamic=True, **options)

    def run(input_ids: torch.Tensor, **inputs: Any) -> Any:
        # A size of 1 never is any size: a single token would need programs of its own.
        return (program if input_ids.numel() > 1 else forward)(input_ids, **inputs)

    return run


def warm(forward: Callable[[Sequence[Row]], object], rows: Sequence[Row]) -> None:
    """Run batches of one, two and all rows, which compiles all there is to compile.

    Raises `InvalidSettings` if the compiler fails.
    """
    try:
        for batch in (rows[:1], rows[-1:], rows[:2], rows, rows[:1]):
            forward(batch)
    except Exception as error:  # dynamo, inductor and C++ compilers have exceptions of their own
        logger.debug("compiling failed", exc_info=True)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InvalidSettings(
            f"torch cannot compile the model: {reason:.300}, expected a model, a compiler and a backend that "
            f"go together, or no such key {WHERE}"
        ) from None
