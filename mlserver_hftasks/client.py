"""Explanations at a client: ask a server for them, and read what it answers. Needs no torch.

    from mlserver_hftasks.client import explain

    (reading,) = explain("http://localhost:8080/v2/models/sentiment", ["This is terrible!"])
    reading.words()      # the words of the text, each with its attribution
    reading.to_frame()   # the same as a pandas.DataFrame
    reading              # in a notebook: a heat map

`read` takes an answer that another client got: V2 as JSON, tritonclient's result, or V1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlserver_hftasks.explain.html import page
from mlserver_hftasks.explain.reading import Reading, Target, Word

if TYPE_CHECKING:
    import httpx

__all__ = ["AnsweredWithError", "Reading", "Target", "Word", "explain", "page", "read"]

RECORD = "explanation"
TIMEOUT_S = 60.0


class AnsweredWithError(Exception):
    """The server refused the request; the message is the server's."""

    def __init__(self, status_code: int, message: str) -> None:
        super().__init__(f"{status_code}: {message}")
        self.status_code = status_code


def explain(
    model_url: str,
    texts: Sequence[Any],
    *,
    client: httpx.Client | None = None,
    timeout_s: float = TIMEOUT_S,
    **options: Any,
) -> list[Reading]:
    """Ask a server to explain what the model at that URL says of each text; needs httpx.

    `model_url` is `http://.../v2/models/NAME`, with `/versions/VERSION` if need be, or what completes the
    URL of `client`. `texts` are what the task takes: texts, or dicts of `question` and `context` and the
    like. `options` are those of docs/explanations.md, and the task's own parameters. Raises
    `AnsweredWithError`, and httpx's own errors.
    """
    import httpx

    body = {"inputs": [_tensor(texts)], "outputs": [{"name": RECORD}], "parameters": options}
    post = httpx.post if client is None else client.post
    response = post(f"{model_url.rstrip('/')}/explain", json=body, timeout=timeout_s)
    if response.is_error:
        raise AnsweredWithError(response.status_code, _message(response.text))
    return read(response.json())


def read(answer: Any) -> list[Reading]:
    """The explanations in an answer, one per text.

    `answer`: the JSON of a V2 or V1 response as a dict, or a result of `tritonclient`. Raises `ValueError`
    if it holds no explanation.
    """
    return [
        Reading.of(json.loads(record) if isinstance(record, str | bytes) else record)
        for record in _records(answer)
    ]


def _records(answer: Any) -> Iterable[Any]:
    if not isinstance(answer, Mapping):
        array = answer.as_numpy(RECORD)
        if array is None:
            raise ValueError(f"no output '{RECORD}' in the answer, expected one")
        return list(array.reshape(-1))
    if "explanations" in answer:
        return list(answer["explanations"])
    for output in answer.get("outputs", ()):
        if output["name"] == RECORD:
            return list(output["data"])
    raise ValueError(f"no output '{RECORD}' in the answer, expected one")


def _tensor(texts: Sequence[Any]) -> dict[str, Any]:
    data = [json.dumps(text) for text in texts]
    parameters = {"content_type": "hg_jsonlist"}
    return {
        "name": "array_inputs",
        "shape": [len(data)],
        "datatype": "BYTES",
        "data": data,
        "parameters": parameters,
    }


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return text[:500]
