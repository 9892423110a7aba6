"""fill-mask: the likeliest tokens in the place of each mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from mlserver_hftasks.backends.base import Head, Level
from mlserver_hftasks.engine.rows import FloatArray, IntArray
from mlserver_hftasks.errors import InvalidRequest, InvalidSettings, RequestTooLarge
from mlserver_hftasks.tasks.base import Answered, Example, ModelFacts, Task
from mlserver_hftasks.tasks.encoder import Encoding
from mlserver_hftasks.tasks.scores import softmax
from mlserver_hftasks.tasks.signature import Datatype, OutputSpec, Signature, Tensor
from mlserver_hftasks.tasks.text import TEXTS, OneOrMore, TextParameters, truncation_of

MAX_PREDICTIONS = 50_000
"""Most predictions of one request, masks x top_k: each is a text of its own in the answer."""
MAX_TARGETS = 10_000
"""Most targets of one request."""

TokenizerOption = Literal["truncation", "max_length"]


class FillMaskParameters(TextParameters):
    """Parameters of `transformers.FillMaskPipeline`."""

    top_k: int | None = Field(5, ge=1, description="how many tokens per mask")
    targets: OneOrMore | None = Field(
        None,
        min_length=1,
        max_length=MAX_TARGETS,
        description="choose among these; one that is no token counts as its first token",
    )
    tokenizer_kwargs: dict[TokenizerOption, Any] | None = Field(
        None, description="truncation and max_length, as the pipeline takes them"
    )

    @model_validator(mode="before")
    @classmethod
    def _lift_tokenizer_kwargs(cls, values: Any) -> Any:
        """What `tokenizer_kwargs` may hold are parameters of ours: they are checked as such."""
        options = values.get("tokenizer_kwargs")
        if not isinstance(options, dict):
            return values
        return {**values, **{name: options[name] for name in ("truncation", "max_length") if name in options}}


@dataclass(frozen=True, slots=True)
class Blanks:
    """A text with masks."""

    ids: IntArray
    """[tokens]"""
    positions: IntArray
    """[masks]"""
    targets: IntArray | None
    """The token ids to choose among, or None for all."""


class FillMask(Task[FillMaskParameters]):
    """Results equal those of `transformers.FillMaskPipeline`. The head runs on the masks only."""

    name = "fill-mask"
    head = Head("AutoModelForMaskedLM", {"logits": Level.TOKEN}, selects=True)
    unwraps_single = True
    signature = Signature(
        inputs=(TEXTS,),
        parameters=FillMaskParameters,
        outputs=(
            OutputSpec("token", "INT64", (-1, -1, -1), "ids of the top_k tokens of each mask; -1 fills up"),
            OutputSpec("token_str", "BYTES", (-1, -1, -1), "the tokens as text; '' fills up"),
            OutputSpec("sequence", "BYTES", (-1, -1, -1), "the text with the token in place; '' fills up"),
            OutputSpec("score", "FP32", (-1, -1, -1), "probabilities of the tokens; 0 fills up"),
        ),
    )

    def __init__(self, model: ModelFacts) -> None:
        super().__init__(model)
        self._tokenizer = model.encoder.tokenizer
        if self._tokenizer.mask_token_id is None:
            raise InvalidSettings(
                "the tokenizer has no mask token, expected one as fill-mask needs it "
                "@ parameters.extra.pretrained_tokenizer"
            )
        self._mask_id: int = self._tokenizer.mask_token_id
        self._pad_id = -1 if self._tokenizer.pad_token_id is None else self._tokenizer.pad_token_id

    def examples(self, inputs: Mapping[str, Sequence[Any]], parameters: FillMaskParameters) -> list[Example]:
        """One row per text; its outputs are those of the masks."""
        texts = self.texts(inputs.get("inputs", ()), "inputs")
        targets = None if parameters.targets is None else self._target_ids(parameters.targets)
        truncation = truncation_of(self.model, parameters.truncation, parameters.max_length)
        encodings = self.model.encoder.encode(texts, truncation)
        examples = [self._example(encoding, targets, f"inputs[{i}]") for i, encoding in enumerate(encodings)]
        masks = sum(len(example.context.positions) for example in examples)
        count = masks * _count(parameters, targets)
        if count > MAX_PREDICTIONS:
            raise RequestTooLarge(
                f"{count} predictions for {masks} masks, expected at most {MAX_PREDICTIONS} @ top_k"
            )
        return examples

    def postprocess(self, answered: Answered, parameters: FillMaskParameters) -> Any:
        """A list of dicts, or with several masks one such list per mask."""
        scores, tokens = _best(answered, parameters)
        texts, sequences = self._token_texts(tokens), self._sequences(answered, tokens)
        answers = [
            [
                {"score": score, "token": token, "token_str": text, "sequence": sequence}
                for score, token, text, sequence in zip(*of_mask, strict=True)
            ]
            for of_mask in zip(scores.tolist(), tokens.tolist(), texts, sequences, strict=True)
        ]
        return answers[0] if len(answers) == 1 else answers

    def tensors(
        self, names: Sequence[str], answered: Sequence[Answered], parameters: FillMaskParameters
    ) -> Mapping[str, Tensor]:
        """All [n, most masks, top_k]."""
        best = [_best(item, parameters) for item in answered]
        made = {
            "token": _stacked("INT64", [tokens for _, tokens in best], -1),
            "score": _stacked("FP32", [scores for scores, _ in best], 0),
        }
        if "token_str" in names:
            made["token_str"] = _stacked("BYTES", [self._token_texts(tokens) for _, tokens in best], "")
        if "sequence" in names:
            sequences = [
                self._sequences(item, tokens) for item, (_, tokens) in zip(answered, best, strict=True)
            ]
            made["sequence"] = _stacked("BYTES", sequences, "")
        return {name: made[name] for name in names}

    def _example(self, encoding: Encoding, targets: IntArray | None, where: str) -> Example:
        ids = np.asarray(encoding.ids, dtype=np.int64)
        positions = np.flatnonzero(ids == self._mask_id)
        if not len(positions):
            raise InvalidRequest(
                f"no mask in a text of {len(ids)} tokens, expected '{self._tokenizer.mask_token}' @ {where}"
            )
        row = self.model.encoder.row(encoding, select=positions)
        return Example((row,), Blanks(ids, positions, targets))

    def target_id(self, target: str, where: str) -> int:
        """The token that a target names. Raises `InvalidRequest` if that is none."""
        found = self._target_id(self.text(target, where))
        if found is None:
            raise InvalidRequest(f"no token in {target!r:.60}, expected one @ {where}")
        return found

    def _target_ids(self, targets: Sequence[str]) -> IntArray:
        ids = {self._target_id(self.text(target, f"targets[{i}]")) for i, target in enumerate(targets)}
        ids.discard(None)
        if not ids:
            raise InvalidRequest(
                f"no tokens in {targets!r:.60}, expected at least one target with one @ targets"
            )
        return np.array(sorted(ids), dtype=np.int64)  # type: ignore[type-var]

    def _target_id(self, target: str) -> int | None:
        """The id of a token, else of the first token in a text, else None."""
        if self.model.encoder.is_fast:
            known: int | None = self._tokenizer.backend_tokenizer.token_to_id(target)
        else:
            known = self._tokenizer.get_vocab().get(target)
        if known is not None:
            return known
        pieces: list[int] = self._tokenizer.encode(target, add_special_tokens=False, verbose=False)
        cut = pieces[:1] if self._tokenizer.truncation_side == "right" else pieces[-1:]
        return cut[0] if cut else None

    def _token_texts(self, tokens: IntArray) -> list[list[str]]:
        """The tokens by themselves, like `tokens` [masks, top_k]."""
        return [[self._tokenizer.decode([token]) for token in of_mask] for of_mask in tokens.tolist()]

    def _sequences(self, answered: Answered, tokens: IntArray) -> list[list[str]]:
        """The text with each of the tokens [masks, top_k] in its place.

        Special tokens are left out, unless that would hide the other masks.
        """
        blanks: Blanks = answered.example.context
        alone = len(blanks.positions) == 1
        filled = blanks.ids.copy()
        sequences: list[list[str]] = []
        for position, of_mask in zip(blanks.positions.tolist(), tokens.tolist(), strict=True):
            sequences.append([])
            for token in of_mask:
                filled[position] = token
                kept = filled[filled != self._pad_id].tolist()
                sequences[-1].append(self._tokenizer.decode(kept, skip_special_tokens=alone))
            filled[position] = self._mask_id
        return sequences


def _count(parameters: FillMaskParameters, targets: IntArray | None) -> int:
    """How many tokens per mask: no more than there are targets."""
    top_k = 5 if parameters.top_k is None else parameters.top_k
    return top_k if targets is None else min(top_k, len(targets))


def _best(answered: Answered, parameters: FillMaskParameters) -> tuple[FloatArray, IntArray]:
    """Probabilities and token ids, best first, both [masks, top_k]; no more than the vocabulary has."""
    targets = answered.example.context.targets
    scores = softmax(answered.outputs[0]["logits"])
    if targets is not None:
        scores = scores[:, targets]
    order = _order(scores, min(_count(parameters, targets), scores.shape[1]))
    tokens: IntArray = order if targets is None else targets[order]
    return np.take_along_axis(scores, order, axis=1), tokens


def _order(scores: FloatArray, count: int) -> IntArray:
    """Indices of the `count` largest of each row, largest first, without sorting the rest."""
    some = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    some.sort(axis=1)
    ranks = np.argsort(-np.take_along_axis(scores, some, axis=1), axis=1, kind="stable")
    return np.take_along_axis(some, ranks, axis=1)


def _stacked(datatype: Datatype, items: Sequence[Any], fill: Any) -> Tensor:
    """One [masks, top_k] per item as one tensor [n, most masks, top_k]."""
    dtype = {"BYTES": np.object_, "FP32": np.float32, "INT64": np.int64}[datatype]
    shape = (len(items), max(map(len, items)), max(len(item[0]) for item in items))
    values: npt.NDArray[Any] = np.full(shape, fill, dtype=dtype)
    for index, item in enumerate(items):
        values[index, : len(item)] = item
    return Tensor(datatype, values)
