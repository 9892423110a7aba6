"""Eager torch: padded or packed, any device, float32, bfloat16 or float16."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from mlserver_hftasks.backends import feeds
from mlserver_hftasks.backends import probe as probing
from mlserver_hftasks.backends.base import Description, Head, Level
from mlserver_hftasks.backends.gradients import PathBackend
from mlserver_hftasks.backends.packing import Backbone, Layout
from mlserver_hftasks.backends.placed import moved
from mlserver_hftasks.engine.rows import IntArray, Outputs, Row
from mlserver_hftasks.errors import InvalidSettings

logger = logging.getLogger("mlserver.hftasks")

TOLERANCES = {"bfloat16": 6e-2, "float16": 1e-2, "int8": 1e-2}
"""Largest difference, relative to the largest output, that batching a row with others may make."""
TOLERANCE = 1e-4
"""The same in other precisions."""
BLOCK_TOKENS = {"cpu": 256}
"""Tokens of one pass in the block layout, where attention costs their square; 2048 on other devices."""


class TorchBackend:
    """Runs rows through a model of transformers.

    With `packing`, the layouts of `packing.Layout` are tried on a probe batch in turn, and the first
    that gives each row what it gets alone is used. `probe` holds rows for that, of real tokens where a
    head looks for some (BART's for the end of the text); else they are drawn at random. `precision` is
    what the model computes in, where that is not the dtype of its weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: Head,
        *,
        device: torch.device,
        pad_token_id: int,
        packing: bool = True,
        probe: Sequence[Row] | None = None,
        precision: str | None = None,
    ) -> None:
        model.config.use_cache = False  # keys and values are kept for generation only
        self._model = moved(model.eval().requires_grad_(False), device)
        self._head = head
        self._device = device
        self._pad_token_id = pad_token_id
        self._marker = feeds.marker_of(model.config, head)
        self._precision = precision or str(model.dtype).removeprefix("torch.")
        self._backbone = Backbone(model)
        self._gradients: list[PathBackend | None] | None = None
        if packing:
            self._choose_layout(probe)
        layout = self._backbone.layout
        self.padded = layout is Layout.PADDED
        self.description = Description("torch", str(device), self._precision, layout.value)

    def forward(self, rows: Sequence[Row]) -> Sequence[Outputs]:
        """See `base.Backend`."""
        return feeds.gathered(rows, feeds.alike(rows, self._marker), self._in_passes)

    def _in_passes(self, rows: Sequence[Row]) -> list[Outputs]:
        return [outputs for part in self._passes(rows) for outputs in self._forward(part)]

    def compile(self, backend: str, mode: str | None, rows: Sequence[Row]) -> None:
        """Compile the backbone, and run the rows so that no client waits for it. Raises `InvalidSettings`."""
        from mlserver_hftasks.backends import compiling

        if self._backbone.layout is not Layout.VARLEN:
            raise InvalidSettings(
                f"the model's rows run {self._backbone.layout.value}, and each of their shapes would be "
                "compiled, expected one that can be packed, or no such key @ parameters.extra.compile"
            )
        make = functools.partial(compiling.compiled, backend=backend, mode=mode)
        self._backbone.replace(make, compiling.ATTENTION_NAME, compiling.outside)
        compiling.warm(self._forward, rows)

    def close(self) -> None:
        """See `base.Backend`."""
        for gradients in self._gradients or ():
            if gradients is not None:
                gradients.close()
        self._backbone.release()
        del self._model, self._backbone, self._gradients
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def gradients(self) -> PathBackend | None:
        """See `gradients.Differentiable`."""
        if self._gradients is None:
            self._gradients = [PathBackend.of(self)]
        return self._gradients[0]

    def _forward(self, rows: Sequence[Row]) -> list[Outputs]:
        with torch.inference_mode():
            outputs = self._outputs(rows)
        return self._split(outputs, rows)

    def _outputs(self, rows: Sequence[Row]) -> ModelOutput:
        """What the model says of rows that run together, in whatever mode torch is."""
        arrays = feeds.padded(rows, self._pad_token_id)
        tensors = {name: self._tensor(array) for name, array in arrays.items()}
        self._backbone.select = self._tensor(feeds.selection(rows))
        outputs: ModelOutput = self._model(**tensors)
        return outputs

    def _passes(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """The rows in groups that run together: all of them, unless the layout forbids."""
        layout = self._backbone.layout
        if layout in (Layout.VARLEN, Layout.PADDED):
            yield rows
            return
        most = 1 if layout is Layout.SINGLE else BLOCK_TOKENS.get(self._device.type, 2048)
        start = tokens = 0
        for index, row in enumerate(rows):
            if index > start and tokens + row.cost > most:
                yield rows[start:index]
                start, tokens = index, 0
            tokens += row.cost
        yield rows[start:]

    # -- rows to tensors and back ----------------------------------------------------------------

    def _tensor(self, array: IntArray | None) -> torch.Tensor | None:
        return None if array is None else torch.from_numpy(array).to(self._device)

    def _split(self, outputs: ModelOutput, rows: Sequence[Row]) -> list[Outputs]:
        arrays = {name: outputs[name].float().cpu().numpy() for name in self._head.outputs}
        return feeds.split(arrays, rows, self._head)

    # -- choosing a layout -----------------------------------------------------------------------

    def _choose_layout(self, probe: Sequence[Row] | None) -> None:
        config, name = self._model.config, type(self._model).__name__
        if probe is None:
            probe = probing.random_rows(self._model.get_input_embeddings().num_embeddings, config)
        rows = probing.hard_rows(probe, config, self._pad_token_id)
        alone = [self._forward([row])[0] for row in rows]
        tolerance = TOLERANCES.get(self._precision, TOLERANCE)
        # Padding gets more room: where even that is not enough, rows can only run one by one.
        for layout, room in ((Layout.VARLEN, 1), (Layout.BLOCK, 1), (Layout.PADDED, 5)):
            reason = self._objection(layout, rows, alone, room * tolerance)
            if reason is None:
                break
            logger.debug("layout %s does not fit %s: %s", layout.value, name, reason)
        else:
            self._backbone.use(Layout.SINGLE)
        if self._backbone.layout in (Layout.PADDED, Layout.SINGLE):
            logger.info("%s cannot be packed; its rows run %s", name, self._backbone.layout.value)
        self._read_early(rows, alone, tolerance)

    def _read_early(self, rows: Sequence[Row], alone: Sequence[Outputs], tolerance: float) -> None:
        """Compute no more of the last layer than the head reads, if its answers stay what they are.

        Whether a head over whole rows reads their first tokens is seen by giving it no others.
        """
        levels = set(self._head.outputs.values())
        first = levels == {Level.SEQUENCE}
        if len(levels) > 1 or not self._backbone.read_early(first=first):
            return
        if not first:
            rows, alone = probing.selected(rows, alone)
        reason = probing.objection_to(self._forward, rows, alone, tolerance)
        if reason is not None:
            logger.debug("%s is not read early: %s", type(self._model).__name__, reason)
            self._backbone.read_all()

    def _objection(
        self, layout: Layout, rows: Sequence[Row], alone: Sequence[Outputs], tolerance: float
    ) -> str | None:
        """Why the layout cannot be used, or None if it can; see `probe`."""
        try:
            self._backbone.use(layout)
        except TypeError as error:
            return str(error)
        return probing.objection_to(self._forward, rows, alone, tolerance)
