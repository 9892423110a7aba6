"""Makes a program of a model: chooses its layout, exports it, and compares it with the model."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from transformers import PreTrainedModel

from mlserver_hftasks.backends import lanes, probe
from mlserver_hftasks.backends.base import Description, Head, Level
from mlserver_hftasks.backends.feeds import marker_of
from mlserver_hftasks.backends.packing import first_position
from mlserver_hftasks.backends.program import Layout, Plan, ProgramBackend, Reads
from mlserver_hftasks.backends.torch import TorchBackend
from mlserver_hftasks.engine.rows import Outputs, Row
from mlserver_hftasks.errors import InvalidSettings, first_line
from mlserver_hftasks.export.job import Export, Format, Order
from mlserver_hftasks.export.trace import EagerRunner, traceable

logger = logging.getLogger("mlserver.hftasks")

WRITERS: Mapping[Format, str] = {"onnx": "onnx", "openvino": "openvino", "export": "dynamo"}
"""Modules of this package by format: each is imported when it is asked for, with all that it needs."""
NOISY = ("transformers", "torch.export", "torch.onnx", "torch._export", "onnxscript", "onnx_ir", "root")
TOLERANCE = 1e-4
"""Largest difference of a traced model from the model, relative to the largest output."""


@dataclass(frozen=True, slots=True)
class Made:
    """A program in a folder."""

    file: str
    plan: Plan
    rows: Sequence[Row]
    """The rows it was probed with."""
    expected: Sequence[Outputs]
    """What the model itself, in its own dtype on torch, says of each."""


class Maker:
    """Makes programs of one model. `probe_rows` are of real tokens; `tell` is told what goes on."""

    def __init__(
        self,
        model: PreTrainedModel,
        head: Head,
        probe_rows: Sequence[Row],
        pad_token_id: int,
        tell: Callable[[str], None],
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        self._head, self._pad, self._tell = head, pad_token_id, tell
        rows = [probe.selecting(row) if head.selects else row for row in probe_rows]
        self._rows = probe.hard_rows(rows, model.config, pad_token_id)
        reference = TorchBackend(model, head, device=model.device, pad_token_id=pad_token_id, packing=False)
        self._alone = [reference.forward([row])[0] for row in self._rows]
        reference.close()

    def make(self, order: Order, folder: Path, calibration: Sequence[Row]) -> Made:
        """Write the program into the folder. Raises `InvalidSettings` if the model cannot be exported."""
        reasons = []
        for plan in self._plans(fused=order.format != "onnx"):
            self._tell(f"exporting to {order.format}, {plan.layout.value}")
            try:
                return self._export(order, plan, folder, calibration)
            except InvalidSettings:
                raise
            except Exception as error:  # whatever an exporter makes of an architecture it does not know
                logger.debug("no export of %s", plan, exc_info=True)
                reasons.append(f"{plan.layout.value}: {reason_of(error)}")
        raise InvalidSettings(
            f"{type(self._model).__name__} cannot be exported to {order.format} "
            f"({'; '.join(reasons) or 'no layout gives each row its own answer'}), expected one that can, "
            'or the backend "torch" @ parameters.extra.backend'
        )

    def _plans(self, *, fused: bool) -> Iterator[Plan]:
        """The layouts in which the traceable model gives each row what it gets alone, the fastest first."""
        padding_idx = first_position(self._model.base_model)
        selected = [Reads.SELECTED] if self._head.selects else []
        sequences = all(level is Level.SEQUENCE for level in self._head.outputs.values())
        reads = selected or ([Reads.FIRST, Reads.ALL] if sequences else [Reads.ALL])
        candidates = [Plan(Layout.LANES, self._pad, each, padding_idx) for each in reads]
        others = (selected or [Reads.ALL])[0]
        marker = marker_of(self._model.config, self._head)
        padded = (Layout.PADDED, Layout.SINGLE)
        candidates += [Plan(layout, self._pad, others, marker=marker) for layout in padded]
        for plan in candidates:
            reason = self._objection(plan, fused)
            if reason is None:
                yield plan
            else:
                logger.debug("%s does not fit %s: %s", plan, type(self._model).__name__, reason)

    def _objection(self, plan: Plan, fused: bool) -> str | None:
        room = 5 if plan.layout is Layout.PADDED else 1
        try:
            with traceable(self._model, self._head, plan.layout, fused=fused) as model:
                runner = EagerRunner(model, self._head, self._inputs(plan))
                backend = ProgramBackend(runner, self._head, plan, Description("torch", "cpu", "", ""))
                return probe.objection_to(backend.forward, self._rows, self._alone, room * TOLERANCE)
        except TypeError as error:
            return str(error)

    def _inputs(self, plan: Plan) -> frozenset[str]:
        typed = "token_type_ids" in self._rows[0].arrays
        if plan.layout is Layout.LANES:
            return frozenset(lanes.INPUTS) | ({"packed_types"} if typed else set())
        selects = {"reads"} if plan.reads is Reads.SELECTED else set()
        return frozenset(self._rows[0].arrays) | {"attention_mask"} | selects

    def _sample(self, plan: Plan) -> dict[str, torch.Tensor]:
        feed = ProgramBackend.feed_of(plan, self._rows)
        return {name: torch.from_numpy(feed[name]) for name in sorted(self._inputs(plan))}

    def _export(self, order: Order, plan: Plan, folder: Path, calibration: Sequence[Row]) -> Made:
        fused = order.format != "onnx"
        with traceable(self._model, self._head, plan.layout, fused=fused) as model, quiet_exporters():
            writer = import_module(f"{__package__}.{WRITERS[order.format]}")
            job = Export(model, self._sample(plan), order, plan, folder, calibration, self._tell)
            file: str = writer.write(job)
        return Made(file, plan, self._rows, self._alone)


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Without what exporters say of themselves: that they are experimental, and which versions they know."""
    levels = {name: logging.getLogger(name).level for name in NOISY}
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def reason_of(error: BaseException) -> str:
    """The first line of what an exporter failed of: it wraps that in errors of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
