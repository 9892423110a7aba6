"""`model.generate()` over batches of rows: whatever a model can generate, with equal parameters in a batch.

Encoders with a decoder (BART, T5, Marian, M2M100) run here, and of decoder-only models what continuous
batching does not take, such as beam search. The batch runs until its last row is done. Each row keeps its
own seed, its own limits and its own deadline (`steering`), and gets what it would get alone.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor
from transformers.modeling_outputs import BaseModelOutput

from mlserver_hftasks.backends.base import Description
from mlserver_hftasks.backends.placed import moved
from mlserver_hftasks.engine.rows import Decoding, FloatArray, IntArray, Outputs, Row
from mlserver_hftasks.engine.sequences import FINISH_REASONS
from mlserver_hftasks.generation.keys import GenerateKey
from mlserver_hftasks.generation.logprobs import token_logprobs
from mlserver_hftasks.generation.steering import (
    WARPERS,
    Decode,
    Draw,
    First,
    Processor,
    Unpadded,
    Watch,
    drawing_from,
    warpers_of,
)

LENGTHS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens")
OF_BEAMS: tuple[str, ...] = ("early_stopping", "length_penalty")
"""Settings that mean nothing without beams."""
OF_DRAWS: tuple[str, ...] = (*(name for name, _, _ in WARPERS), "eta_cutoff")
"""Settings that mean nothing where the most likely token is taken."""
PROBE = Decoding(max_new_tokens=8)
"""How far a row is continued that does not say: those of the warm-up."""


class GenerateBackend:
    """Runs rows through `generate()`; see `base.Backend`.

    Outputs per row, k answers each: `sequences` [k, longest] of int64, the new tokens, filled up with the
    padding token; `lengths` and `finish` [k] of int64, the latter an index into `FINISH_REASONS`; where the
    key asks for them `logprobs` [k, longest] of float32, what the model itself makes of each token.

    `model` is this backend's own: its `generation_config` and cache settings change. `precision` is what it
    computes in, where that is not the dtype of its weights.
    """

    padded = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: torch.device,
        pad_token_id: int,
        decode: Decode,
        precision: str | None = None,
    ) -> None:
        self._model = moved(model.eval().requires_grad_(False), device)
        self._device = device
        self._decode = decode
        self._follows_encoder = bool(model.config.is_encoder_decoder)
        self._defaults = _without_lengths(model.generation_config)
        if self._defaults.pad_token_id is None:
            self._defaults.pad_token_id = pad_token_id
        start = self._defaults.decoder_start_token_id
        self._start = (self._defaults.bos_token_id if start is None else start) or 0
        model.generation_config = GenerationConfig()  # each call brings its own, complete
        dtype = precision or str(model.dtype).removeprefix("torch.")
        self.description = Description("generate", str(device), dtype, "padded")

    def forward(self, rows: Sequence[Row]) -> Sequence[Outputs]:
        """See `base.Backend`."""
        key = rows[0].key if isinstance(rows[0].key, GenerateKey) else GenerateKey()
        config = self._config(key)
        outputs: dict[int, Outputs] = {}
        for part in _parts(rows, config):
            made = self._generate([rows[index] for index in part], key, copy.copy(config))
            outputs.update(zip(part, made, strict=True))
        return [outputs[index] for index in range(len(rows))]

    def close(self) -> None:
        """See `base.Backend`."""
        del self._model
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    # -- one call of generate() ------------------------------------------------------------------

    def _generate(self, rows: Sequence[Row], key: GenerateKey, config: GenerationConfig) -> list[Outputs]:
        decodings = [_decoding(row) for row in rows]
        inputs, padding = self._collate(rows)
        prompt_tokens = 1 if self._follows_encoder else inputs["input_ids"].shape[1]
        most = max(decoding.max_new_tokens for decoding in decodings)
        least = min(decodings[0].min_new_tokens, most)
        config.max_length = prompt_tokens + most
        config.min_length = prompt_tokens + least if least else 0
        answers, beams = config.num_return_sequences or 1, _beams(config) > 1
        watch = Watch(decodings, prompt_tokens, _token_ids(config.eos_token_id), key.stop, self._decode)
        with torch.inference_mode(), self._drawing(config, decodings):
            made = self._model.generate(
                **(inputs if beams else self._repeated(inputs, answers)),
                logits_processor=self._taken_over(config, decodings, padding, prompt_tokens),
                generation_config=config,
                stopping_criteria=[watch],
            )
        found = _new_tokens(made, prompt_tokens, watch)
        parts = [found[start : start + answers] for start in range(0, len(found), answers)]
        return [self._outputs(row, parts[index], index, watch, key) for index, row in enumerate(rows)]

    def _taken_over(
        self,
        config: GenerationConfig,
        decodings: Sequence[Decoding],
        padding: Sequence[int],
        prompt_tokens: int,
    ) -> list[Processor]:
        """What does row by row what `generate()` would do otherwise; `config` asks it no longer."""
        made: list[Processor] = []
        first = [decoding.first_token for decoding in decodings]
        if any(token is not None for token in first):
            made.append(First(first, prompt_tokens))
        if any(padding) and config.no_repeat_ngram_size:
            made.append(Unpadded(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size), padding))
            config.no_repeat_ngram_size = 0
        if config.do_sample and _beams(config) == 1:
            seeds = [decoding.seed for decoding in decodings]
            made.append(Draw(warpers_of(config, self._device), seeds, self._device))
            config.do_sample = False
            for name in OF_DRAWS:
                setattr(config, name, None)
        if _beams(config) == 1:
            config.num_return_sequences = 1  # the inputs are repeated
        return made

    def _drawing(
        self, config: GenerationConfig, decodings: Sequence[Decoding]
    ) -> AbstractContextManager[None]:
        beams_draw = config.do_sample and _beams(config) > 1
        return drawing_from(decodings[0].seed) if beams_draw else nullcontext()

    def _config(self, key: GenerateKey) -> GenerationConfig:
        config = copy.deepcopy(self._defaults)
        for name, value in key.arguments:
            setattr(config, name, _thawed(value))
        unused = () if config.do_sample else OF_DRAWS
        unused += () if _beams(config) > 1 else OF_BEAMS
        for name in unused:  # of which generate() would complain
            setattr(config, name, None)
        if not self._follows_encoder:
            config.forced_bos_token_id = None  # the first token is the prompt's
        config.return_dict_in_generate, config.output_scores = True, False
        return config

    def _collate(self, rows: Sequence[Row]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Tensors [n, longest] with their attention mask, and the padding before each row.

        A decoder's prompt is padded on the left, since new tokens follow on the right.
        """
        lengths = [len(row.arrays["input_ids"]) for row in rows]
        longest = max(lengths)
        ids = np.full((len(rows), longest), self._defaults.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=np.int64)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            where = slice(length) if self._follows_encoder else slice(longest - length, longest)
            ids[index, where] = row.arrays["input_ids"]
            mask[index, where] = 1
        arrays = {"input_ids": ids, "attention_mask": mask}
        before = [0 if self._follows_encoder else longest - length for length in lengths]
        return {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}, before

    def _repeated(self, inputs: dict[str, torch.Tensor], times: int) -> dict[str, Any]:
        """The inputs, each row so many times; what the encoder makes of it is computed once."""
        if times == 1:
            return inputs
        repeated: dict[str, Any] = {
            name: tensor.repeat_interleave(times, dim=0) for name, tensor in inputs.items()
        }
        if self._follows_encoder:
            hidden = self._model.get_encoder()(**inputs).last_hidden_state
            repeated["encoder_outputs"] = BaseModelOutput(hidden.repeat_interleave(times, dim=0))
            del repeated["input_ids"]
        return repeated

    # -- what came of it -------------------------------------------------------------------------

    def _outputs(
        self, row: Row, answers: Sequence[list[int]], index: int, watch: Watch, key: GenerateKey
    ) -> Outputs:
        sequences = np.full(
            (len(answers), max(map(len, answers))), self._defaults.pad_token_id, dtype=np.int64
        )
        for place, tokens in enumerate(answers):
            sequences[place, : len(tokens)] = tokens
        reasons = [FINISH_REASONS.index(watch.reason(index, tokens)) for tokens in answers]
        outputs: dict[str, IntArray | FloatArray] = {
            "sequences": sequences,
            "lengths": np.array([len(tokens) for tokens in answers], dtype=np.int64),
            "finish": np.array(reasons, dtype=np.int64),
        }
        if key.logprobs:
            outputs["logprobs"] = token_logprobs(self._model, row.arrays["input_ids"], sequences, self._start)
        return outputs


def _parts(rows: Sequence[Row], config: GenerationConfig) -> Iterator[list[int]]:
    """Indices of rows that share a call: `generate()` has one least length, and one greatest for what looks
    ahead to the end. Beams that draw share with nobody, since they draw from torch's own generator."""
    parts: dict[Hashable, list[int]] = {}
    beams = _beams(config) > 1
    for index, row in enumerate(rows):
        decoding = _decoding(row)
        ahead = decoding.max_new_tokens if beams or config.forced_eos_token_id is not None else None
        alone = index if beams and config.do_sample else None
        parts.setdefault((decoding.min_new_tokens, ahead, alone), []).append(index)
    yield from parts.values()


def _new_tokens(made: Any, prompt_tokens: int, watch: Watch) -> list[list[int]]:
    """The new tokens of each sequence, up to where it ended."""
    sequences: list[list[int]] = made.sequences[:, prompt_tokens:].tolist()
    if "beam_indices" not in made:
        return [watch.kept(index, tokens) for index, tokens in enumerate(sequences)]
    counts = (made.beam_indices >= 0).sum(dim=1).tolist()
    return [tokens[:count] for tokens, count in zip(sequences, counts, strict=True)]


def _decoding(row: Row) -> Decoding:
    return PROBE if row.decoding is None else row.decoding


def _beams(config: GenerationConfig) -> int:
    return config.num_beams or 1


def _token_ids(value: int | Sequence[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)


def _without_lengths(config: GenerationConfig) -> GenerationConfig:
    made = copy.deepcopy(config)
    for name in LENGTHS:
        setattr(made, name, None)
    return made


def _thawed(value: Any) -> Any:
    return [_thawed(each) for each in value] if isinstance(value, tuple) else value
