"""Programs of `torch.export`, in `.pt2` files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from mlserver_hftasks.backends.program import Feed
from mlserver_hftasks.engine.rows import FloatArray
from mlserver_hftasks.errors import InvalidSettings


class ExportedRunner:
    """An exported program; see `program.Runner`. Raises `InvalidSettings` for what cannot be read."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self._device = torch.device(device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, about how it stores trees
                program = torch.export.load(str(path))
        except Exception as error:  # zip, pickle and torch each raise their own
            raise InvalidSettings(
                f"'{path.name}' cannot be read by torch.export: {' '.join(str(error).split()):.200}, "
                "expected a program of torch.export @ parameters.extra.file_name"
            ) from None
        if self._device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, self._device)
        self._call = program.module()
        self.inputs = frozenset(program.call_spec.in_spec.child(1).context)
        self.outputs = frozenset(program.call_spec.out_spec.context)

    def run(self, feed: Feed) -> Mapping[str, FloatArray]:
        """See `program.Runner`."""
        with torch.inference_mode():
            outputs = self._call(
                **{name: torch.from_numpy(array).to(self._device) for name, array in feed.items()}
            )
        return {name: tensor.float().cpu().numpy() for name, tensor in outputs.items()}

    def close(self) -> None:
        """See `program.Runner`."""
        del self._call
