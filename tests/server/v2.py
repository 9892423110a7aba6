"""V2 requests as JSON, what comes back, and small helps to send many at once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

T = TypeVar("T")


class Metrics:
    """One scrape of `/metrics`."""

    def __init__(self, text: str) -> None:
        families = list(text_string_to_metric_families(text))
        self._samples = [sample for family in families for sample in family.samples]
        self.kinds = {family.name: family.type for family in families}

    def value(self, name: str, model: str, **labels: str) -> float:
        """The sum of the samples of that name and model that have the labels; 0 if there are none."""
        wanted = {"model_name": model, **labels}
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == name and wanted.items() <= sample.labels.items()
        )


def infer_path(model: str, version: str | None = None) -> str:
    return f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"


def results_of(response: httpx.Response) -> list[Any]:
    """The parsed elements of the default output of an answer that must be a success."""
    assert response.status_code == 200, f"{response.status_code}: {response.text[:500]}"
    (output,) = response.json()["outputs"]
    assert output["name"] == "output"
    return [json.loads(element) for element in output["data"]]


def tensor(
    name: str,
    data: Any,
    datatype: str = "BYTES",
    content_type: str | None = None,
    shape: Sequence[int] | None = None,
) -> dict[str, Any]:
    """An input tensor of a V2 request as JSON."""
    size = len(data) if isinstance(data, list) else 1
    made = {"name": name, "shape": list(shape or [size]), "datatype": datatype, "data": data}
    return {**made, "parameters": {"content_type": content_type}} if content_type else made


def texts(*values: str, name: str = "inputs") -> list[dict[str, Any]]:
    """The inputs of a request that brings these texts."""
    return [tensor(name, list(values))]


def at_once(functions: Sequence[Callable[[], T]], threads: int | None = None) -> list[T]:
    """Call all functions concurrently; their results in order."""
    with ThreadPoolExecutor(threads or len(functions)) as pool:
        return [future.result() for future in [pool.submit(function) for function in functions]]


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether the condition comes true in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def assert_same(got: Any, want: Any) -> None:
    """Equal, numbers within 1e-5."""
    if isinstance(want, float):
        assert got == pytest.approx(want, abs=1e-5, rel=1e-5)
    elif isinstance(want, dict):
        assert got.keys() == want.keys()
        for key in want:
            assert_same(got[key], want[key])
    elif isinstance(want, list):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_same(one, other)
    else:
        assert got == want
