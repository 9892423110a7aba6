"""Explains a model that can only be asked: which words of a text its score rests on.

The features are words, since of another server's model the tokens are not known. Absent words are left
out, or replaced by a text of the settings. Of a question and its context the score is that of the answer's
text, wherever it is found.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlserver_hftasks.engine.rows import FloatArray
from mlserver_hftasks.engine.together import together
from mlserver_hftasks.errors import ForwardFailed, InvalidRequest, Overloaded
from mlserver_hftasks.explain.methods.base import Effort, Estimate
from mlserver_hftasks.explain.methods.masking import MaskMethod, occlusion, permutation_shap
from mlserver_hftasks.explain.options import ExplainOptions
from mlserver_hftasks.explain.remote import RemoteModel, Scores
from mlserver_hftasks.explain.result import Explanation
from mlserver_hftasks.explain.words import QUESTION, Item, Words, words_of
from mlserver_hftasks.tasks.base import Answered, ItemLimits
from mlserver_hftasks.tasks.signature import Parameters

METHODS = {"permutation-shap": permutation_shap, "occlusion": occlusion}
DEFAULT_METHOD = "permutation-shap"
LEFT_OUT = "left out"
MOST_DIGITS = 9
"""Of the number of a label."""


class BlackBoxExplainer:
    """Explains what a `RemoteModel` says of texts. `replacement` stands for an absent word."""

    def __init__(
        self,
        model: RemoteModel,
        *,
        replacement: str = "",
        limits: ItemLimits | None = None,
        max_waiting: int = 256,
    ) -> None:
        self._model = model
        self._replacement = replacement
        self._limits = limits or ItemLimits()
        self._max_waiting = max_waiting
        self._waiting = 0

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that need no gradients."""
        return ("auto", *METHODS)

    async def explain(
        self,
        inputs: Mapping[str, Sequence[Any]],
        parameters: Parameters,
        options: ExplainOptions,
        answered: Sequence[Answered] | None = None,
    ) -> list[Explanation]:
        """One explanation per text; the answers are never known. Raises `HFTasksError`."""
        method = self._method(options)
        texts = words_of(inputs, self._limits)
        if self._waiting + len(texts) > self._max_waiting:
            raise Overloaded(
                f"{self._waiting} texts are being explained and the request brings {len(texts)}, expected at "
                f"most {self._max_waiting} together @ max_queue_explanations"
            )
        until = None
        if options.deadline_ms is not None:
            until = asyncio.get_running_loop().time() + options.deadline_ms / 1e3
        self._waiting += len(texts)
        try:
            return await together(self._explain(words, method, options, until) for words in texts)
        finally:
            self._waiting -= len(texts)

    async def close(self) -> None:
        """Close the connections."""
        await self._model.close()

    async def _explain(
        self, words: Words, method: str, options: ExplainOptions, until: float | None
    ) -> Explanation:
        # The answer to the text itself says what to explain, whatever the time.
        (whole,) = await self._model.scores([words.item])
        if not whole:
            raise ForwardFailed("no score of the model that is explained, expected some @ infer_uri")
        label = _target(options.target, whole)
        run = METHODS[method](len(words.spans), Effort(options.tolerance, options.max_evals))
        estimate = await self._run(run, words, {_digest(words.item): whole}, label, until)
        return self._explanation(words, method, label, tuple(whole), estimate)

    async def _run(
        self, method: MaskMethod, words: Words, known: dict[bytes, Scores], label: str, until: float | None
    ) -> Estimate:
        """Run a method to its end; texts that come out the same are asked for once, and not kept."""
        try:
            masks = next(method)
            while True:
                items = [words.without(mask, self._replacement) for mask in masks]
                keys = [_digest(item) for item in items]
                wanted = {key: item for key, item in zip(keys, items, strict=True) if key not in known}
                answers = await self._model.scores(list(wanted.values()), until)
                known.update(
                    (key, said) for key, said in zip(wanted, answers, strict=True) if said is not None
                )
                masks = method.send([_score(known.get(key), label, words.item) for key in keys])
        except StopIteration as end:
            estimate: Estimate = end.value
            return estimate

    def _explanation(
        self, words: Words, method: str, label: str, labels: Sequence[str], estimate: Estimate
    ) -> Explanation:
        spans, texts = np.array(words.spans, dtype=np.int64).reshape(-1, 3), words.item.texts
        counts = np.bincount(spans[:, 0], minlength=len(texts)).tolist()
        return Explanation(
            tokens=tuple(texts[number][start:end] for number, start, end in words.spans),
            offsets=spans[:, 1:],
            word_ids=np.concatenate([np.arange(count, dtype=np.int64) for count in counts]),
            sequence_ids=spans[:, 0],
            attributions=estimate.attributions,
            target=np.array([[-1, _id_of(label, words.item)]], dtype=np.int64),
            target_label=(label,),
            score=estimate.score,
            baseline_score=estimate.baseline_score,
            delta=estimate.delta,
            converged=estimate.converged,
            method=method,
            baseline=self._replacement or LEFT_OUT,
            evaluations=estimate.evaluations,
            texts=texts,
        )

    def _method(self, options: ExplainOptions) -> str:
        method = DEFAULT_METHOD if options.method == "auto" else options.method
        if method not in METHODS:
            raise InvalidRequest(
                f"got {method}, but of a model on another server there are no gradients, expected one of "
                f"{', '.join(self.methods)} @ method"
            )
        if options.per_token:
            raise InvalidRequest(
                "got true, but of a model on another server the tokens are not known, expected false "
                "@ per_token"
            )
        if options.baseline != "auto":
            raise InvalidRequest(
                f"got {options.baseline}, expected auto: what stands for an absent word is the setting "
                "infer_mask @ baseline"
            )
        return method


def _digest(item: Item) -> bytes:
    """What an item is known by: the texts of all coalitions together take much memory."""
    return hashlib.blake2b(repr(item.texts).encode(), digest_size=16).digest()


def _id_of(label: str, item: Item) -> int:
    """Of a label that is called by its number; -1 for others, and for answers, which may be years."""
    numbered = item.fields != QUESTION and label.isascii() and label.isdecimal()
    return int(label) if numbered and len(label) <= MOST_DIGITS else -1


def _target(target: str | int | None, whole: Scores) -> str:
    """The label to explain: the one asked for, else the one with the highest score."""
    if target is None or target == "predicted":
        return max(whole, key=lambda label: whole[label])
    if str(target) not in whole:
        raise InvalidRequest(f"got {target!r:.60}, expected one of {', '.join(sorted(whole)):.300} @ target")
    return str(target)


def _score(said: Scores | None, label: str, item: Item) -> FloatArray | None:
    if said is None:
        return None
    if label not in said and item.fields == QUESTION:  # an answer that is not among the best any more
        return np.zeros(1, dtype=np.float32)
    if label not in said:
        raise ForwardFailed(f"no score of '{label:.60}' for a part of the text, expected one @ infer_uri")
    return np.array([said[label]], dtype=np.float32)
