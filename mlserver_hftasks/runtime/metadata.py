"""`GET /v2/models/NAME`: what a model takes and gives, exactly."""

from __future__ import annotations

from typing import Any

from mlserver.types import MetadataModelResponse, MetadataTensor
from mlserver.types import Parameters as V2Parameters

from mlserver_hftasks.codecs.response import RESULT_NAME
from mlserver_hftasks.loading import Served
from mlserver_hftasks.tasks.signature import Signature

_DATATYPES = (("integer", "INT64"), ("number", "FP32"), ("boolean", "BOOL"))


def described(response: MetadataModelResponse, served: Served) -> MetadataModelResponse:
    """MLServer's own answer, with what is served and how."""
    how = served.description
    response.platform = response.platform or "transformers"
    response.inputs = input_tensors(served.task.signature)
    response.outputs = output_tensors(served.task.signature)
    response.parameters = V2Parameters(
        task=served.task.name,
        backend=how.backend,
        device=how.device,
        dtype=how.dtype,
        packing=how.packing,
        max_length=served.task.model.encoder.max_tokens,
        **_of_generation(served),
    )
    return response


def _of_generation(served: Served) -> dict[str, Any]:
    if not served.task.head.generates:
        return {}
    limits = served.task.model.limits
    found: dict[str, Any] = {"max_new_tokens": limits.max_new_tokens}
    return found if served.decoder is None else {**found, "kv_cache_tokens": limits.cache_tokens}


def input_tensors(signature: Signature) -> list[MetadataTensor]:
    """The inputs, each alias by itself, then the parameters: they travel as tensors too."""
    items = [
        MetadataTensor(
            name=name,
            datatype="BYTES",
            shape=[-1],
            parameters=V2Parameters(
                content_type="str", role="input", required=spec.required, description=spec.description
            ),
        )
        for spec in signature.inputs
        for name in (spec.name, *spec.aliases)
    ]
    schema = signature.parameters.model_json_schema()["properties"]
    return items + [_parameter(name, schema[name]) for name in signature.parameters.model_fields]


def output_tensors(signature: Signature) -> list[MetadataTensor]:
    """The result as JSON, then the typed outputs that a request may name."""
    result = MetadataTensor(
        name=RESULT_NAME,
        datatype="BYTES",
        shape=[-1, 1],
        parameters=V2Parameters(
            content_type="hg_jsonlist", default=True, description="one JSON text per result"
        ),
    )
    typed = [
        MetadataTensor(
            name=spec.name,
            datatype=spec.datatype,
            shape=list(spec.shape),
            parameters=V2Parameters(
                content_type="str" if spec.datatype == "BYTES" else "np",
                default=False,
                description=spec.description,
            ),
        )
        for spec in signature.outputs
    ]
    return [result, *typed]


def _parameter(name: str, schema: dict[str, Any]) -> MetadataTensor:
    kinds = {kind.get("type") for kind in (schema, *schema.get("anyOf", ()))}
    datatype = next((datatype for kind, datatype in _DATATYPES if kind in kinds), "BYTES")
    if kinds & {"string", "array", "object"}:
        datatype = "BYTES"
    extra = {"default": schema["default"]} if schema.get("default") is not None else {}
    return MetadataTensor(
        name=name,
        datatype=datatype,
        shape=[-1] if "array" in kinds else [1],
        parameters=V2Parameters(
            role="parameter", required=False, description=schema.get("description", ""), **extra
        ),
    )
