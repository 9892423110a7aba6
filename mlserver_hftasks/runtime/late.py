"""An explainer that is made when the first explanation is asked for.

A program of ONNX Runtime or OpenVINO is ready, and predicts, without torch; a model that generates is ready
before anything but its steps was tried out.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from mlserver_hftasks.explain.methods.base import too_late
from mlserver_hftasks.explain.options import ExplainOptions, cannot_explain
from mlserver_hftasks.explain.result import Explanation
from mlserver_hftasks.runtime.explaining import Explains
from mlserver_hftasks.tasks.base import Answered

T = TypeVar("T")


class LateExplainer(Generic[T]):
    """`prepare` is called on a thread and takes long; `make`, of its result on the event loop, does not.

    `methods` is what the explainer can presumably do; () if there is nothing to explain.
    """

    def __init__(
        self,
        task_name: str,
        methods: tuple[str, ...],
        prepare: Callable[[], T],
        make: Callable[[T], Explains],
    ) -> None:
        self._task_name = task_name
        self._methods = methods
        self._prepare = prepare
        self._make = make
        self._explainer: Explains | None = None
        self._making: asyncio.Task[Explains] | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """Of the explainer, once there is one."""
        return self._methods if self._explainer is None else self._explainer.methods

    async def explain(
        self,
        inputs: Mapping[str, Sequence[Any]],
        parameters: Any,
        options: ExplainOptions,
        answered: Sequence[Answered] | None = None,
    ) -> list[Explanation]:
        """See `Explainer.explain`; raises `DeadlineExceeded` also if there is no explainer by then."""
        if not self._methods:
            raise cannot_explain(options.method, (), self._task_name)
        began = time.monotonic()
        explainer = self._explainer or await self._made(options)
        if options.deadline_ms is not None:
            left = options.deadline_ms - 1e3 * (time.monotonic() - began)
            if left <= 0:
                raise too_late()
            options = options.model_copy(update={"deadline_ms": left})
        return await explainer.explain(inputs, parameters, options, answered)

    async def close(self) -> None:
        """Fail what still waits."""
        if self._making is not None:
            with contextlib.suppress(Exception):  # was told to those who asked
                await self._making
        if self._explainer is not None:
            await self._explainer.close()

    async def _made(self, options: ExplainOptions) -> Explains:
        """The explainer, made once for all who wait for it, whoever goes away meanwhile."""
        if self._making is None:
            self._making = asyncio.create_task(self._first())
        try:
            async with asyncio.timeout(None if options.deadline_ms is None else options.deadline_ms / 1e3):
                return await asyncio.shield(self._making)
        except TimeoutError:
            raise too_late() from None

    async def _first(self) -> Explains:
        try:
            self._explainer = self._make(await asyncio.to_thread(self._prepare))
        finally:
            self._making = None
        return self._explainer
