"""TorchScript: programs that were traced before torch.export was, as TorchServe's handlers save them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mlserver_hftasks.backends.program import Feed
from mlserver_hftasks.engine.rows import FloatArray
from mlserver_hftasks.errors import InvalidSettings

ORDER = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
"""A traced model takes tensors by their place; this is the usual one where names are lost."""


class TorchScriptRunner:
    """A traced program; see `program.Runner`. `names` are those of its outputs, in order.

    Raises `InvalidSettings` for what cannot be read.
    """

    def __init__(self, path: Path, device: str = "cpu", names: Sequence[str] = ("logits",)) -> None:
        self._device = torch.device(device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                self._call: Any = torch.jit.load(  # type: ignore[no-untyped-call]
                    str(path), map_location=self._device
                ).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise InvalidSettings(
                f"'{path.name}' cannot be read by torch.jit: {' '.join(str(error).split()):.200}, expected a "
                "traced model @ parameters.extra.file_name"
            ) from None
        arguments = [each.name for each in self._call.forward.schema.arguments[1:]]
        known = all(name in ORDER for name in arguments)
        self._arguments = arguments if known else list(ORDER[: len(arguments)])
        self._names = tuple(names)
        self.inputs, self.outputs = frozenset(self._arguments), frozenset(names)

    def run(self, feed: Feed) -> Mapping[str, FloatArray]:
        """See `program.Runner`."""
        tensors = [torch.from_numpy(feed[name]).to(self._device) for name in self._arguments]
        with torch.inference_mode():
            outputs = self._call(*tensors)
        if isinstance(outputs, torch.Tensor):
            outputs = (outputs,)
        found = [outputs[name] for name in self._names] if isinstance(outputs, dict) else list(outputs)
        return {name: tensor.float().cpu().numpy() for name, tensor in zip(self._names, found, strict=False)}

    def close(self) -> None:
        """See `program.Runner`."""
        del self._call
