"""Where a model's weights are."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model on the device; one that was loaded onto several (`device_map`) stays where it is."""
    return model if getattr(model, "hf_device_map", None) else model.to(device)
