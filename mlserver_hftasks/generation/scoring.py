"""How likely a model that generates finds answers that are there already, and gradients of that.

The generating engine keeps keys and values, and gives the logits after a sequence's last token. Here a prompt
and its answer run as one row in one pass, packed with others, through a clone of the model's modules that
shares the weights: what generates is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel

from mlserver_hftasks.backends import feeds
from mlserver_hftasks.backends.base import Description, Head, Level
from mlserver_hftasks.backends.gradients import PathBackend, ScoredRow, products_of
from mlserver_hftasks.backends.placed import moved
from mlserver_hftasks.backends.torch import TorchBackend
from mlserver_hftasks.engine.rows import Outputs, Row

HEAD = Head("AutoModelForCausalLM", {"logits": Level.TOKEN}, selects=True)
PROBED_TOKENS = 4
"""Of each row of the probe, since logits over a vocabulary take much memory."""
MOST_FED_TOKENS = 512
"""Of the decoders of one pass, filled up, for the same reason: the engine counts what the encoders read."""


class _Gate:
    """A hook that holds a model up. A copy of the model is not held up."""

    def __init__(self) -> None:
        self.pause: Callable[[], object] = lambda: None

    def __call__(self, module: torch.nn.Module, inputs: object, outputs: object) -> None:
        self.pause()

    def __deepcopy__(self, memo: object) -> _Gate:
        return _Gate()


class ScoringBackend:
    """Runs `ScoredRow`s over a decoder-only model, without keys and values; see `base.Backend`.

    `model` is this class's own; making it probes how the model's rows can be packed, which takes a while.
    `probe` are rows of real tokens; `precision` as in `TorchBackend`. `pause` is called after each product
    with a matrix of weights, from the beginning on: whoever gives it can hold the work up there.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: torch.device,
        pad_token_id: int,
        probe: Sequence[Row],
        precision: str | None = None,
        pause: Callable[[], object] = lambda: None,
    ) -> None:
        gate = _Gate()
        gate.pause = pause
        for module in products_of(model.base_model):
            module.register_forward_hook(gate)
        rows = [replace(row, select=np.arange(row.cost)[-PROBED_TOKENS:]) for row in probe]
        self._backend = TorchBackend(
            model, HEAD, device=device, pad_token_id=pad_token_id, probe=rows, precision=precision
        )
        self.description = self._backend.description
        self.padded = self._backend.padded

    def forward(self, rows: Sequence[Row]) -> Sequence[Outputs]:
        """Per `ScoredRow` its `score` [K]."""
        return [
            outputs
            for part in self._backend._passes(rows)
            for outputs in self._forward([row for row in part if isinstance(row, ScoredRow)])
        ]

    def gradients(self) -> PathBackend | None:
        """See `gradients.Differentiable`."""
        return self._backend.gradients()

    def close(self) -> None:
        """See `base.Backend`."""
        self._backend.close()

    @torch.inference_mode()
    def _forward(self, rows: Sequence[ScoredRow]) -> list[Outputs]:
        logits = self._backend._outputs(rows).logits
        counts = [row.cost if row.select is None else len(row.select) for row in rows]
        scores = (
            row.score({"logits": logits[index, :count]})
            for index, (row, count) in enumerate(zip(rows, counts, strict=True))
        )
        return [{"score": score.float().cpu().numpy()} for score in scores]


class EncodedScoring:
    """The same over a model whose decoder follows an encoder, in padded batches and without gradients.

    Rows have `decoder_input_ids` [K] beside `input_ids`. `pause` is called after each product.
    """

    padded = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: torch.device,
        pad_token_id: int,
        pause: Callable[[], object] = lambda: None,
    ) -> None:
        gate = _Gate()
        gate.pause = pause
        for module in products_of(model.base_model):
            module.register_forward_hook(gate)
        self._model = moved(model.eval().requires_grad_(False), device)
        self._device = device
        self._pad_token_id = pad_token_id
        dtype = str(model.dtype).removeprefix("torch.")
        self.description = Description("torch", str(device), dtype, "padded")

    def forward(self, rows: Sequence[Row]) -> Sequence[Outputs]:
        """See `ScoringBackend`."""
        scored = [row for row in rows if isinstance(row, ScoredRow)]
        return [outputs for part in _passes(scored) for outputs in self._forward(part)]

    def close(self) -> None:
        """See `base.Backend`."""
        del self._model

    @torch.inference_mode()
    def _forward(self, scored: Sequence[ScoredRow]) -> list[Outputs]:
        read = [Row({"input_ids": row.arrays["input_ids"]}) for row in scored]
        fed = [Row({"input_ids": row.arrays["decoder_input_ids"]}) for row in scored]
        arrays = feeds.padded(read, self._pad_token_id)
        arrays["decoder_input_ids"] = feeds.padded(fed, self._pad_token_id)["input_ids"]
        tensors = {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}
        logits = self._model(**tensors, use_cache=False).logits
        scores = (row.score({"logits": logits[i, : fed[i].cost]}) for i, row in enumerate(scored))
        return [{"score": score.float().cpu().numpy()} for score in scores]


def _passes(rows: Sequence[ScoredRow]) -> Iterator[Sequence[ScoredRow]]:
    """The rows in groups whose decoders take few tokens; a row by itself may have any number."""
    start = longest = 0
    for index, row in enumerate(rows):
        fed = len(row.arrays["decoder_input_ids"])
        if index > start and (index + 1 - start) * max(longest, fed) > MOST_FED_TOKENS:
            yield rows[start:index]
            start, longest = index, 0
        longest = max(longest, fed)
    yield rows[start:]
