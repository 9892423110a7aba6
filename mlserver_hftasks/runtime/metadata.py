"""`GET /v2/models/NAME`: what a model takes and gives, exactly."""

from __future__ import annotations

from typing import Any

from mlserver.types import MetadataModelResponse, MetadataTensor
from mlserver.types import Parameters as V2Parameters

from mlserver_hftasks.codecs.request import EXPLAIN
from mlserver_hftasks.codecs.response import RESULT_NAME
from mlserver_hftasks.explain.options import ExplainOptions
from mlserver_hftasks.explain.tensors import HTML_NAME, OUTPUTS
from mlserver_hftasks.loading import Served
from mlserver_hftasks.runtime.explaining import AnsweringService
from mlserver_hftasks.tasks.signature import OutputSpec, Signature

_EXPLAIN_SCHEMA = {
    "type": "string",
    "description": "explain too: true, the name of a method, or an object of options as JSON",
}
_DATATYPES = (("integer", "INT64"), ("number", "FP32"), ("boolean", "BOOL"))


def described(
    response: MetadataModelResponse, service: AnsweringService, served: Served | None
) -> MetadataModelResponse:
    """MLServer's own answer, with what is served and how; None is served by who explains another model."""
    explains = bool(service.methods)
    response.inputs, response.outputs = tensors_of(service.signature, service.mode, explains=explains)
    own: dict[str, Any] = {"mode": service.mode}
    if explains:
        own["explain_methods"] = ", ".join(service.methods)
        own["explain_outputs"] = ", ".join(spec.name for spec in OUTPUTS)
    if served is None:
        response.platform = response.platform or "v2"
        response.parameters = V2Parameters(**own)
        return response
    how = served.description
    response.platform = response.platform or "transformers"
    response.parameters = V2Parameters(
        task=served.task.name,
        backend=how.backend,
        device=how.device,
        dtype=how.dtype,
        packing=how.packing,
        max_length=served.task.model.encoder.max_tokens,
        **_of_generation(served),
        **own,
    )
    return response


def _of_generation(served: Served) -> dict[str, Any]:
    if not served.task.head.generates:
        return {}
    limits = served.task.model.limits
    found: dict[str, Any] = {"max_new_tokens": limits.max_new_tokens}
    return found if served.decoder is None else {**found, "kv_cache_tokens": limits.cache_tokens}


def tensors_of(
    signature: Signature, mode: str, *, explains: bool
) -> tuple[list[MetadataTensor], list[MetadataTensor]]:
    """Inputs and outputs of a model in that mode.

    Of a model that predicts, the outputs are those of predictions: an explanation's can be named only in a
    request that asks for one.
    """
    inputs = input_tensors(signature)
    if mode == EXPLAIN:
        options = ExplainOptions.model_json_schema()["properties"]
        own = [tensor for tensor in inputs if tensor.name not in options]
        return [*own, *(_parameter(name, options[name]) for name in options)], explanation_tensors()
    return inputs + [_parameter(EXPLAIN, _EXPLAIN_SCHEMA)] * explains, output_tensors(signature)


def explanation_tensors() -> list[MetadataTensor]:
    """The outputs of an explanation; all but one are there in a request that names none."""
    return [_typed(spec, default=spec.name != HTML_NAME) for spec in OUTPUTS]


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
    return [result, *(_typed(spec, default=False) for spec in signature.outputs)]


def _typed(spec: OutputSpec, *, default: bool) -> MetadataTensor:
    return MetadataTensor(
        name=spec.name,
        datatype=spec.datatype,
        shape=list(spec.shape),
        parameters=V2Parameters(
            content_type="str" if spec.datatype == "BYTES" else "np",
            default=default,
            description=spec.description,
        ),
    )


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
