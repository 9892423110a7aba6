"""A model on another V2 server, as somebody sees it who can only ask: texts in, scores by label out.

Pairs and questions are sent as tensors by the names of their fields where the model's metadata has those, or
says nothing; else as JSON objects, which is how `mlserver_huggingface` takes pairs.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import httpx
import orjson

from mlserver_hftasks.engine.together import together
from mlserver_hftasks.errors import (
    DeadlineExceeded,
    ForwardFailed,
    HFTasksError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from mlserver_hftasks.explain.words import QUESTION, TEXT, Item

BATCH_TEXTS = 32
"""Texts of one request."""
BEST_ANSWERS = 20
"""Answers to a question that are asked for: one that is not among them counts as 0."""
MAX_CONCURRENT = 4
"""Requests at once to the other server."""
TIMEOUT_S = 30.0
MAX_ANSWER_BYTES = 16 * 2**20
TYPED_NAMES = ("logits", "probabilities", "scores")
"""Outputs that hold a number per label, where the settings name none and there is no JSON."""

Scores = Mapping[str, float]
"""By label."""


class RemoteModel:
    """Asks the model at that URL.

    `input_name` takes texts. `output_name` is a tensor of numbers, [texts, labels]; None: labels with scores
    as JSON, as this runtime and mlserver_huggingface answer, or else one of `TYPED_NAMES`. `metadata_uri` is
    where the model says what it takes; None if that must not be asked.
    """

    def __init__(
        self,
        uri: str,
        *,
        input_name: str = "array_inputs",
        output_name: str | None = None,
        metadata_uri: str | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._uri = uri
        self._input_name = input_name
        self._output_name = output_name
        self._metadata_uri = metadata_uri
        self._input_names: frozenset[str] | None = None
        self._timeout_s = timeout_s
        self._places = asyncio.Semaphore(MAX_CONCURRENT)
        # No proxy, no credentials from the environment, no redirect: this URL and no other.
        self._client = httpx.AsyncClient(timeout=timeout_s, trust_env=False, follow_redirects=False)

    async def scores(self, items: Sequence[Item], until: float | None = None) -> list[Scores | None]:
        """The scores of each item; None for those that were not known by `until`, in the loop's time.

        The items have the same fields. Raises `HFTasksError`.
        """
        if items and items[0].fields != TEXT and self._input_names is None:
            self._input_names = await self._names_of_inputs()
        parts = [items[start : start + BATCH_TEXTS] for start in range(0, len(items), BATCH_TEXTS)]
        return list(chain.from_iterable(await together(self._part(part, until) for part in parts)))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _part(self, items: Sequence[Item], until: float | None) -> list[Scores | None]:
        try:
            async with asyncio.timeout_at(until), self._places:
                answer = await self._send("POST", self._uri, self._request(items))
        except TimeoutError:
            return [None] * len(items)
        with _unreadable_as_failure():
            scores = self._read(orjson.loads(answer), items)
        if len(scores) != len(items):
            raise ForwardFailed(
                f"{len(scores)} answers of the model that is explained, expected {len(items)} @ infer_uri"
            )
        return list(scores)

    async def _names_of_inputs(self) -> frozenset[str] | None:
        """What the model's metadata calls its inputs; none where it does not say, None if not now."""
        if self._metadata_uri is None:
            return frozenset()
        try:
            metadata = orjson.loads(await self._send("GET", self._metadata_uri))
            return frozenset(str(each["name"]) for each in metadata.get("inputs") or ())
        except (Unavailable, Overloaded, DeadlineExceeded):
            return None
        except (HFTasksError, ValueError, KeyError, TypeError, AttributeError):
            return frozenset()

    def _request(self, items: Sequence[Item]) -> bytes:
        inputs = self._inputs(items)
        if self._output_name is not None:
            return orjson.dumps({"inputs": inputs, "outputs": [{"name": self._output_name}]})
        # As a tensor, since mlserver_huggingface takes its parameters so: the scores of all labels.
        wanted = str(BEST_ANSWERS) if items[0].fields == QUESTION else "null"
        return orjson.dumps({"inputs": [*inputs, _tensor("top_k", [wanted], "hg_json")]})

    def _inputs(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        fields = items[0].fields
        if fields == TEXT:
            return [_tensor(self._input_name, [item.texts[0] for item in items], "str")]
        if self._input_names and not set(fields) <= self._input_names:
            objects = [orjson.dumps(dict(zip(fields, item.texts, strict=True))).decode() for item in items]
            return [_tensor(self._input_name, objects, "hg_jsonlist")]
        columns = zip(*(item.texts for item in items), strict=True)
        return [_tensor(field, list(column), "str") for field, column in zip(fields, columns, strict=True)]

    async def _send(self, method: str, uri: str, body: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json"}
        try:
            async with self._client.stream(method, uri, content=body, headers=headers) as response:
                answer = b""
                async for chunk in response.aiter_bytes():
                    answer += chunk
                    if len(answer) > MAX_ANSWER_BYTES:
                        raise ForwardFailed(f"an answer of over {MAX_ANSWER_BYTES} bytes @ infer_uri")
        except httpx.TimeoutException:
            raise DeadlineExceeded(
                f"the model that is explained gave no answer within {self._timeout_s:g} s @ infer_uri"
            ) from None
        except httpx.HTTPError as error:
            raise Unavailable(
                f"the model that is explained does not answer ({type(error).__name__}) @ infer_uri"
            ) from None
        if response.status_code != 200:
            raise _as_ours(response, answer)
        return answer

    def _read(self, answer: Any, items: Sequence[Item]) -> list[Scores]:
        outputs = {output["name"]: output for output in answer["outputs"]}
        if self._output_name is not None:
            return _numbers(outputs[self._output_name])
        if "output" in outputs:
            results = [orjson.loads(element) for element in outputs["output"]["data"]]
            # The answers to a single question come by themselves, not as a list in a list.
            return [_entries(each) for each in ([results] if len(items) == 1 else results)]
        return _numbers(next(outputs[name] for name in TYPED_NAMES if name in outputs))


def _tensor(name: str, data: list[str], content_type: str) -> dict[str, Any]:
    parameters = {"content_type": content_type}
    return {"name": name, "shape": [len(data)], "datatype": "BYTES", "data": data, "parameters": parameters}


def _entries(result: Any) -> Scores:
    """Of `{"label", "score"}` or `{"answer", "score"}`, or lists of those; scores of one name add up."""
    if isinstance(result, list):
        scores: Counter[str] = Counter()
        for entry in result:
            scores.update(_entries(entry))
        return scores
    return {str(result["label"] if "label" in result else result["answer"]): float(result["score"])}


def _numbers(output: Mapping[str, Any]) -> list[Scores]:
    """Of a tensor [texts, labels]; labels are called by their numbers."""
    texts, labels = output["shape"]
    flat = [float(value) for value in output["data"]]
    if len(flat) != texts * labels:
        raise ValueError(f"{len(flat)} numbers")
    rows = (flat[start : start + labels] for start in range(0, len(flat), labels))
    return [{str(label): score for label, score in enumerate(row)} for row in rows]


@contextmanager
def _unreadable_as_failure() -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, StopIteration, RecursionError) as error:
        raise ForwardFailed(
            f"an answer of the model that is explained cannot be read ({type(error).__name__}), expected "
            "scores by label @ infer_uri"
        ) from None


def _as_ours(response: httpx.Response, body: bytes) -> HFTasksError:
    """The error of the other server, as an error of this one."""
    try:
        said = str(orjson.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        said = response.reason_phrase
    message = f"the model that is explained answered {response.status_code} ({said:.300}) @ infer_uri"
    if response.status_code == 429:
        waits = response.headers.get("Retry-After", "")
        return Overloaded(message, float(waits) if waits.isdecimal() else 1.0)
    kinds: dict[int, type[HFTasksError]] = {
        400: InvalidRequest,
        413: InvalidRequest,
        404: Unavailable,
        503: Unavailable,
        504: DeadlineExceeded,
    }
    return kinds.get(response.status_code, ForwardFailed)(message)
