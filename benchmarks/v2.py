"""Requests of the V2 protocol over REST, as targets of the load generator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from benchmarks.http import get, post


@dataclass(slots=True)
class Texts:
    """One text per request, in turn; request number i carries the id i."""

    host: str
    port: int
    model: str
    texts: Sequence[str]
    name: str = "args"
    """Of the input; with `args` the model gets the text by itself."""
    outputs: Sequence[str] = ()
    """Asked for by name; else the usual one comes."""
    _bodies: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self._bodies = [_tensors(self.name, [text], self.outputs) for text in self.texts]

    def request(self, index: int) -> bytes:
        """See `load.Target`."""
        body = b'{"id":"%d",%b' % (index, self._bodies[index % len(self._bodies)])
        return post(f"/v2/models/{self.model}/infer", body)

    def is_answer(self, index: int, body: bytes) -> bool:
        """See `load.Target`."""
        return b'"id":"%d"' % index in body


@dataclass(slots=True)
class Bulk:
    """All texts in one request."""

    host: str
    port: int
    model: str
    texts: Sequence[str]
    name: str = "inputs"

    def request(self, index: int) -> bytes:
        """See `load.Target`."""
        body = b'{"id":"%d",%b' % (index, _tensors(self.name, self.texts))
        return post(f"/v2/models/{self.model}/infer", body)

    def is_answer(self, index: int, body: bytes) -> bool:
        """See `load.Target`."""
        return b'"id":"%d"' % index in body and len(results(body)) == len(self.texts)


@dataclass(slots=True)
class Probe:
    """GET of a path that answers 200."""

    host: str
    port: int
    path: str = "/v2/health/live"

    def request(self, index: int) -> bytes:
        """See `load.Target`."""
        return get(self.path)

    def is_answer(self, index: int, body: bytes) -> bool:
        """See `load.Target`."""
        return True


def results(body: bytes) -> list[Any]:
    """The decoded elements of the output `output`."""
    (output,) = orjson.loads(body)["outputs"]
    return [json.loads(element) for element in output["data"]]


def _tensors(name: str, texts: Sequence[str], outputs: Sequence[str] = ()) -> bytes:
    """The request's JSON after its id."""
    tensor = {
        "name": name,
        "shape": [len(texts)],
        "datatype": "BYTES",
        "parameters": {"content_type": "str"},
        "data": list(texts),
    }
    asked = {"outputs": [{"name": output} for output in outputs]} if outputs else {}
    return orjson.dumps({"inputs": [tensor], **asked})[1:]
