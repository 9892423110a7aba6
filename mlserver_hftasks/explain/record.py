"""An explanation as JSON can hold it: TorchServe's keys, and beside them what it leaves out.

TorchServe's handler answers `words`, `importances` and `delta`; for question answering the last two once for
the start and once for the end of the answer. There importances are scaled to length one; here they are the
attributions themselves, in the unit of the score, so that they and `delta` add up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from mlserver_hftasks.explain.result import Explanation

ANSWER_ENDS = ("start", "end")
"""Labels of the two scores of question answering."""


def json_of(explanation: Explanation, top_k: int | None = None) -> str:
    """The explanation as JSON text, which `Reading.of` reads; numbers as short as float32 can be written.

    With `top_k` each target also lists its weightiest tokens.
    """
    return orjson.dumps(_record(explanation, top_k), option=orjson.OPT_SERIALIZE_NUMPY).decode()


def _record(explanation: Explanation, top_k: int | None) -> dict[str, Any]:
    targets = [_target(explanation, index, top_k) for index in range(len(explanation.target_label))]
    return {
        "words": list(explanation.tokens),
        **_torchserve(explanation, targets),
        "targets": targets,
        "texts": list(explanation.texts),
        "spans": np.ascontiguousarray(explanation.offsets),
        "word_ids": np.ascontiguousarray(explanation.word_ids),
        "sequence_ids": np.ascontiguousarray(explanation.sequence_ids),
        "method": explanation.method,
        "baseline": explanation.baseline,
        "evaluations": explanation.evaluations,
        **({} if explanation.prompt_tokens is None else {"prompt_tokens": explanation.prompt_tokens}),
    }


def _torchserve(explanation: Explanation, targets: list[dict[str, Any]]) -> dict[str, Any]:
    if explanation.target_label == ANSWER_ENDS:
        ends = list(zip(ANSWER_ENDS, targets, strict=True))
        importances = {f"importances_answer_{end}": target["attributions"] for end, target in ends}
        return {**importances, **{f"delta_{end}": target["delta"] for end, target in ends}}
    if not targets:
        return {"importances": [0.0] * len(explanation.tokens), "delta": 0.0}
    return {"importances": targets[0]["attributions"], "delta": targets[0]["delta"]}


def _target(explanation: Explanation, index: int, top_k: int | None) -> dict[str, Any]:
    position, label = explanation.target[index].tolist()
    made = {
        "label": explanation.target_label[index],
        "id": label,
        "position": position,
        "score": explanation.score[index],
        "baseline_score": explanation.baseline_score[index],
        "delta": explanation.delta[index],
        "converged": bool(explanation.converged[index]),
        "attributions": np.ascontiguousarray(explanation.attributions[index]),
    }
    return made if top_k is None else {**made, "top": _top(explanation, index, top_k)}


def _top(explanation: Explanation, index: int, top_k: int) -> list[dict[str, Any]]:
    """The tokens of the texts with the largest attributions, whatever their sign."""
    attributions = explanation.attributions[index]
    own = np.flatnonzero(explanation.sequence_ids[: explanation.prompt_tokens] >= 0)
    order = own[np.argsort(-np.abs(attributions[own]), kind="stable")][:top_k]
    return [
        {
            "word": explanation.tokens[token],
            "span": explanation.offsets[token].tolist(),
            "attribution": attributions[token],
        }
        for token in order.tolist()
    ]
