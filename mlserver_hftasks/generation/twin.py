"""One model, run in two ways at once."""

from __future__ import annotations

import copy
import itertools

from transformers import PreTrainedModel


def with_shared_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second model over the same tensors, whose config and attention may be set otherwise."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    twin: PreTrainedModel = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    return twin
