"""What a model makes of tokens that are there already."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from mlserver_hftasks.engine.rows import FloatArray, IntArray


def token_logprobs(
    model: PreTrainedModel, prompt: IntArray, sequences: IntArray, start_token_id: int
) -> FloatArray:
    """Natural logarithm of the probability of each token given the prompt and those before it: [k, tokens].

    `prompt` [n] goes to the encoder, if there is one; `sequences` [k, tokens] are the answers, for a
    decoder that follows an encoder without its first token, `start_token_id`. One pass over all of them.
    """
    before = torch.from_numpy(prompt).expand(len(sequences), -1).to(model.device)
    tokens = torch.from_numpy(sequences).to(model.device)
    with torch.inference_mode():
        if model.config.is_encoder_decoder:
            start = tokens.new_full((len(tokens), 1), start_token_id)
            fed = torch.cat((start, tokens[:, :-1]), dim=1)
            logits = model(input_ids=before, decoder_input_ids=fed, use_cache=False).logits
        else:
            fed = torch.cat((before, tokens[:, :-1]), dim=1)
            logits = model(input_ids=fed, use_cache=False).logits[:, -tokens.shape[1] :]
        chosen = logits.float().log_softmax(dim=-1).gather(2, tokens[:, :, None])[:, :, 0]
    found: FloatArray = chosen.cpu().numpy()
    return found
