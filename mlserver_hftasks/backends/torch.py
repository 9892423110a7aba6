"""Eager torch: padded or packed, any device, float32, bfloat16 or float16."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from mlserver_hftasks.backends.base import Description, Head, Level
from mlserver_hftasks.backends.packing import Backbone, Layout
from mlserver_hftasks.engine.rows import Outputs, Row

logger = logging.getLogger(__name__)

PROBE_LENGTHS = (3, 17, 8, 5)
"""Tokens of the sequences on which packing must agree with padding."""
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest difference, relative to the largest output, that packing may make."""


class TorchBackend:
    """Runs rows through a model of transformers.

    With `packing`, the layouts of `packing.Layout` are tried on a probe batch in turn, and the first
    that agrees with padding is used. `probe` holds rows for that, of real tokens where a head looks for
    some (BART's for the end of the text); else they are drawn at random.
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
    ) -> None:
        self._model = model.eval().requires_grad_(False).to(device)
        self._head = head
        self._device = device
        self._pad_token_id = pad_token_id
        self._backbone = Backbone(model)
        if packing:
            self._choose_layout(self._random_rows() if probe is None else probe)
        layout = self._backbone.layout
        self.padded = layout is Layout.PADDED
        self.description = Description("torch", str(device), str(model.dtype).removeprefix("torch."), layout.value)

    def forward(self, rows: Sequence[Row]) -> Sequence[Outputs]:
        """See `base.Backend`."""
        tensors = self._collate(rows)
        self._backbone.select = self._collate_selection(rows)
        with torch.inference_mode():
            outputs = self._model(**tensors)
        return self._split(outputs, rows)

    def close(self) -> None:
        """See `base.Backend`."""
        del self._model, self._backbone
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    # -- rows to tensors and back ----------------------------------------------------------------

    def _collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Padded input tensors [n, longest] with their attention mask."""
        shape = (len(rows), max(row.cost for row in rows))
        arrays = {name: np.zeros(shape, dtype=np.int64) for name in rows[0].arrays}
        arrays["input_ids"].fill(self._pad_token_id)
        arrays["attention_mask"] = np.zeros(shape, dtype=np.int64)
        for index, row in enumerate(rows):
            arrays["attention_mask"][index, : row.cost] = 1
            for name, values in row.arrays.items():
                arrays[name][index, : row.cost] = values
        return {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}

    def _collate_selection(self, rows: Sequence[Row]) -> torch.Tensor | None:
        selections = [row.select for row in rows if row.select is not None]
        if not selections:
            return None
        if len(selections) < len(rows):
            raise ValueError("rows of one batch select positions all or none; their keys must differ")
        index = np.zeros((len(rows), max(map(len, selections))), dtype=np.int64)
        for i, selection in enumerate(selections):
            index[i, : len(selection)] = selection
        return torch.from_numpy(index).to(self._device)

    def _split(self, outputs: ModelOutput, rows: Sequence[Row]) -> list[Outputs]:
        arrays = {name: outputs[name].float().cpu().numpy() for name in self._head.outputs}
        return [
            {
                name: array[index]
                if self._head.outputs[name] is Level.SEQUENCE
                else array[index, : row.cost if row.select is None else len(row.select)]
                for name, array in arrays.items()
            }
            for index, row in enumerate(rows)
        ]

    # -- choosing a layout -----------------------------------------------------------------------

    def _choose_layout(self, rows: Sequence[Row]) -> None:
        expected = self.forward(rows)
        for layout in (Layout.VARLEN, Layout.BLOCK):
            reason = self._disagreement(layout, rows, expected)
            if reason is None:
                return
            logger.debug("layout %s does not fit %s: %s", layout.value, type(self._model).__name__, reason)
        self._backbone.use(Layout.PADDED)
        logger.info("%s cannot be packed; it is served padded", type(self._model).__name__)

    def _disagreement(self, layout: Layout, rows: Sequence[Row], expected: Sequence[Outputs]) -> str | None:
        """Why the layout cannot be used, or None if it gives what padding gives."""
        try:
            self._backbone.use(layout)
            packed = self.forward(rows)
        except Exception as error:  # whatever an architecture makes of a layout that it was not made for
            return repr(error)
        for got, want in zip(packed, expected, strict=True):
            for name, array in want.items():
                scale = max(float(np.abs(array).max()), 1e-6)
                worst = float(np.abs(got[name] - array).max()) / scale
                if not worst <= TOLERANCES[self._model.dtype]:
                    return f"{name} differs by {worst:.1e} of its largest value"
        return None

    def _random_rows(self) -> list[Row]:
        vocabulary = self._model.get_input_embeddings().num_embeddings
        generator = np.random.default_rng(0)
        limit = getattr(self._model.config, "max_position_embeddings", None) or 512
        rows = []
        for length in PROBE_LENGTHS:
            ids = generator.integers(0, vocabulary, min(length, limit - 2))
            ids[ids == self._pad_token_id] = (self._pad_token_id + 1) % vocabulary
            rows.append(Row({"input_ids": ids}))
        return rows
