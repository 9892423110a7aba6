"""What the writers of all formats are given: `onnx`, `openvino` and `dynamo`, each of which has a `write`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from mlserver_hftasks.backends.program import Plan
from mlserver_hftasks.engine.rows import Row
from mlserver_hftasks.settings import Quantization

Format = Literal["onnx", "openvino", "export"]


@dataclass(frozen=True, slots=True)
class Order:
    """What program is wanted."""

    format: Format
    quantization: Quantization = "none"
    provider: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True, slots=True)
class Export:
    """A traceable model on its way into a file."""

    model: PreTrainedModel
    sample: Mapping[str, torch.Tensor]
    """Inputs to trace it with."""
    order: Order
    plan: Plan
    folder: Path
    """Where the program goes."""
    calibration: Sequence[Row]
    """For scales that are found before."""
    tell: Callable[[str], None]

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The sample, for exporters that want a dict of their own."""
        return dict(self.sample)

    @property
    def sizes(self) -> dict[str, dict[int, object]]:
        """Which dimensions of the inputs may vary: all."""
        return {
            name: dict.fromkeys(range(tensor.dim()), torch.export.Dim.AUTO)
            for name, tensor in self.sample.items()
        }
