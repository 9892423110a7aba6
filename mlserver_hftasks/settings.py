"""`parameters.extra`, checked once.

Values come, in falling precedence, from `PREDICTIVE_UNIT_PARAMETERS` (Seldon Core v1), from
`parameters.extra` (Seldon Core v2 hands them over as strings) and from `MLSERVER_MODEL_HUGGINGFACE_*`,
as in mlserver_huggingface. Strings are coerced: "0", "true", "null" and JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from mlserver_hftasks.errors import InvalidSettings, did_you_mean

ENV_PREFIX = "MLSERVER_MODEL_HUGGINGFACE_"
UNIT_PARAMETERS = "PREDICTIVE_UNIT_PARAMETERS"


def _from_json(value: Any) -> Any:
    """A string that holds JSON, decoded; any other value as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _none_from_string(value: Any) -> Any:
    return None if isinstance(value, str) and value.strip().lower() in {"", "none", "null"} else value


def _integer_from_string(value: Any) -> Any:
    value = _none_from_string(value)
    return int(value) if isinstance(value, str) and value.lstrip("-").isdecimal() else value


Quantization = Literal["none", "int8", "int8-static", "int8-weight-only", "int4-weight-only"]
WEIGHT_ONLY: tuple[Quantization, ...] = ("int8-weight-only", "int4-weight-only")
"""What flows through the layers keeps its precision; for models that generate."""

Json = BeforeValidator(_from_json)
Count = Annotated[int, Field(ge=1)]
Threads = Annotated[int, Field(ge=1, le=1024)]


class Compile(BaseModel):
    """`compile`, with the keys that TorchServe's users know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enable: bool = True
    backend: str = "inductor"
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None
    dynamic: Literal[True] | None = None
    """One program for all numbers of tokens; one for each would be made while clients wait."""


def _compile_from_boolean(value: Any) -> Any:
    value = _none_from_string(value)
    return {"enable": value} if isinstance(value, bool) else value


class Settings(BaseModel):
    """All keys of `parameters.extra`. `docs/settings.md` is this class as a table."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    task: str | None = Field(None, description="task or alias; inferred from the model's config if missing")
    task_suffix: str = Field("", description="appended to the task `translation`: `_en_to_fr`")
    pretrained_model: str | None = Field(None, description="hub id or folder; else `parameters.uri`")
    pretrained_tokenizer: str | None = Field(None, description="hub id or folder; else the model's own")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    model_kwargs: Annotated[dict[str, Any], Json] = Field(
        default_factory=dict, description="further arguments of `from_pretrained`"
    )
    framework: Literal["pt"] | None = Field(None, description='"pt"; TensorFlow is gone from transformers')
    backend: Annotated[
        Literal["torch", "onnx", "openvino", "export", "torchscript"] | None,
        BeforeValidator(_none_from_string),
    ] = Field(None, description="what runs the model; the program's own if the folder holds one, else torch")
    optimum_model: bool = Field(
        False, description='as in mlserver_huggingface; the same as `backend: "onnx"`'
    )
    quantization: Annotated[Quantization | None, BeforeValidator(_none_from_string)] = Field(
        None,
        description="int8: scales per token at run time; int8-static: calibrated before; "
        "int8-weight-only, int4-weight-only: the weights alone, of models that generate",
    )
    file_name: Annotated[str | None, BeforeValidator(_none_from_string)] = Field(
        None, description="the program's file in the model's folder: `model_quantized.onnx`, `model.pt`"
    )
    provider: Annotated[
        Literal["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"] | None,
        BeforeValidator(_none_from_string),
    ] = Field(None, description="ONNX Runtime's execution provider; else that of the device")
    provider_options: Annotated[dict[str, str | int | bool], Json] = Field(
        default_factory=dict, description="its options, those of a checked list"
    )
    program_cache: Annotated[str | None, BeforeValidator(_none_from_string)] = Field(
        None, description="folder of exported programs; else one in the user's cache"
    )
    device: Annotated[int | str | None, BeforeValidator(_integer_from_string)] = Field(
        None, description='-1, "cpu", 0, "cuda:1", "mps"; null is the CPU'
    )
    device_map: Annotated[
        Literal["auto", "balanced", "balanced_low_0", "sequential"] | dict[str, int | str] | None,
        Json,
        BeforeValidator(_none_from_string),
    ] = Field(
        None, description="layers on several devices, in place of `device`; a mode, or a map of modules"
    )
    max_memory: Annotated[dict[int | str, int | str] | None, Json, BeforeValidator(_none_from_string)] = (
        Field(None, description='of each device, for `device_map`: `{"0": "20GiB", "cpu": "60GiB"}`')
    )
    tp_plan: Annotated[Literal["auto"] | None, BeforeValidator(_none_from_string)] = Field(
        None, description="tensor parallelism, in a process that torchrun started as one of several"
    )
    compile: Annotated[Compile | None, BeforeValidator(_compile_from_boolean), Json] = Field(
        None, description='`torch.compile`: `{"enable": true, "backend": "inductor", "mode": "default"}`'
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="`auto`: the checkpoint's; float16 becomes float32 on a CPU"
    )
    batch_size: Annotated[Count | None, BeforeValidator(_none_from_string)] = Field(
        None, description="most rows in a batch; also read from `max_batch_size`; 256 if neither is set"
    )
    max_batch_tokens: Count = Field(
        8192, description="most tokens in a batch; the engine learns how many pay"
    )
    max_queue_rows: Count = Field(8192, description="most rows that wait; beyond: 429")
    max_queue_tokens: Count = Field(1_000_000, description="most tokens that wait; beyond: 429")
    max_queue_explanations: Count = Field(
        256, description="most texts that are explained or wait for it; beyond: 429"
    )
    latency_target_ms: Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_none_from_string)] = (
        Field(None, description="keep latency under this, refuse what cannot be: 429")
    )
    timeout_ms: Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_none_from_string)] = Field(
        None, description="give up on a request after this: 504; a request may ask for less"
    )
    max_new_tokens: Count = Field(1024, description="most new tokens that a request may ask for; beyond: 400")
    max_prompt_tokens: Annotated[Count | None, BeforeValidator(_none_from_string)] = Field(
        None, description="most tokens of a prompt, if less than the model takes; beyond: 400"
    )
    kv_cache_tokens: Annotated[Count | None, BeforeValidator(_none_from_string)] = Field(
        None, description="tokens in the cache of keys and values; from model and free memory if not set"
    )
    stream_interval: Count = Field(1, description="tokens per piece of a stream, where requests do not say")
    max_length: Annotated[Count | None, BeforeValidator(_none_from_string)] = Field(
        None, description="most tokens of a text, if less than the model takes"
    )
    truncation: Annotated[bool | str | None, BeforeValidator(_none_from_string)] = Field(
        None, description="cut texts that are too long, for requests that do not say"
    )
    do_lower_case: Annotated[bool | None, BeforeValidator(_none_from_string)] = Field(
        None, description="lower-case texts before they are tokenized"
    )
    packing: Literal["auto", "off"] = Field("auto", description="padding removal, where the model can")
    labels: Annotated[list[str] | dict[int, str] | None, Json] = Field(
        None, description="label names; also read from `index_to_name.json` beside the model"
    )
    intra_op_threads: Annotated[Threads | None, BeforeValidator(_none_from_string)] = Field(
        None, description="threads of one operator; torch decides if not set"
    )
    inter_op_threads: Annotated[Threads | None, BeforeValidator(_none_from_string)] = Field(
        None, description="operators at once; per process, the first model decides"
    )
    warmup: bool = Field(True, description="run some batches at load: the first client does not pay for it")
    max_items: Count = Field(1024, description="most items in a request; beyond: 413")
    max_text_chars: Count = Field(100_000, description="most characters of a text; beyond: 413")
    max_body_bytes: Count = Field(
        16 * 2**20, description="most bytes of a REST body after gunzip; beyond: 413"
    )
    mode: Literal["infer", "explain"] = Field(
        "infer", description="`explain`: every request is answered with explanations; so with `infer_uri`"
    )
    explain: Annotated[dict[str, Any], Json] = Field(
        default_factory=dict, description="options of explanations, for requests that do not say"
    )
    infer_uri: Annotated[str | None, BeforeValidator(_none_from_string)] = Field(
        None, description="explain the V2 model at this URL, as a black box; see docs/explanations.md"
    )
    explainer_type: Annotated[str | None, BeforeValidator(_none_from_string)] = Field(
        None, description="the `method` of explanations, as Seldon Core v2 sets it beside `infer_uri`"
    )
    infer_input: str = Field("array_inputs", description="its input that takes texts")
    infer_output: Annotated[str | None, BeforeValidator(_none_from_string)] = Field(
        None, description="its output [texts, labels] of numbers; else labels with scores as JSON"
    )
    infer_mask: str = Field(
        "", description="what stands for an absent word in its texts; else it is left out"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")

    @field_validator("framework", mode="before")
    @classmethod
    def _no_tensorflow(cls, value: Any) -> Any:
        if value in {"tf", "jax", "flax"}:
            raise ValueError('"pt": transformers 5 has PyTorch models only')
        return _none_from_string(value)

    @field_validator("truncation")
    @classmethod
    def _known_strategy(cls, value: Any) -> Any:
        if isinstance(value, str):
            lowered = value.lower()
            if lowered in {"true", "false"}:
                return lowered == "true"
            if value not in {"longest_first", "only_first", "only_second", "do_not_truncate"}:
                raise ValueError("true, false, longest_first, only_first, only_second or do_not_truncate")
        return value

    @model_validator(mode="before")
    @classmethod
    def _explains_another(cls, values: Any) -> Any:
        if not isinstance(values, dict) or _none_from_string(values.get("infer_uri")) is None:
            return values
        if values.get("mode", "explain") != "explain":
            raise ValueError('infer_uri beside the mode "infer", expected "mode": "explain"')
        return {**values, "mode": "explain"}

    @model_validator(mode="after")
    def _one_backend(self) -> Settings:
        if self.optimum_model and self.backend not in (None, "onnx"):
            raise ValueError(
                f'got optimum_model and the backend "{self.backend}", expected "onnx" or no backend'
            )
        return self

    @model_validator(mode="after")
    def _one_compiler(self) -> Settings:
        if self.compile is None or not self.compile.enable:
            return self
        if self.chosen_backend not in (None, "torch"):
            raise ValueError(f'got compile and the backend "{self.chosen_backend}", expected "torch"')
        if self.quantization not in (None, "none"):
            raise ValueError(f'got compile and the quantization "{self.quantization}", expected one of them')
        return self

    @model_validator(mode="after")
    def _one_placement(self) -> Settings:
        if self.max_memory is not None and self.device_map is None:
            raise ValueError("got max_memory without device_map, expected both, or neither")
        if self.device_map is None and self.tp_plan is None:
            return self
        name = "device_map" if self.device_map is not None else "tp_plan"
        others = {"device": self.device, "tp_plan": self.tp_plan if name == "device_map" else None}
        others["quantization"] = self.quantization if self.quantization != "none" else None
        others["backend"] = self.chosen_backend if self.chosen_backend != "torch" else None
        for other, value in others.items():
            if value is not None:
                raise ValueError(f"got {name} and the {other} {value!r}, expected one of them")
        return self

    @property
    def chosen_backend(self) -> str | None:
        """The backend that the settings name; None leaves it to the model's folder."""
        return "onnx" if self.optimum_model else self.backend

    @model_validator(mode="after")
    def _suffix_fits(self) -> Settings:
        if self.task_suffix and self.task != "translation":
            raise ValueError(f"no task_suffix for the task {self.task!r}: only `translation` takes one")
        return self


def read_settings(
    extra: Mapping[str, Any], environment: Mapping[str, str], defaults: Mapping[str, Any] | None = None
) -> Settings:
    """The settings of a model. `defaults` come last, after the environment.

    Raises `InvalidSettings` that names the key, what came and what is right.
    """
    names = Settings.model_fields
    from_env = {
        key[len(ENV_PREFIX) :].lower(): value
        for key, value in environment.items()
        if key.upper().startswith(ENV_PREFIX)
    }
    values = {
        **(defaults or {}),
        **{name: value for name, value in from_env.items() if name in names},
        **extra,
        **_unit_parameters(environment.get(UNIT_PARAMETERS, "")),
    }
    for name in values:
        if name not in names:
            raise InvalidSettings(f"unknown setting '{name}', {did_you_mean(name, names)} @ parameters.extra")
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise InvalidSettings(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return f"{message} @ parameters.extra"
    return f"got {first['input']!r:.80}, expected: {message} @ parameters.extra.{first['loc'][0]}"


def _boolean(text: str) -> bool:
    lowered = text.lower()
    if lowered not in {"y", "yes", "t", "true", "on", "1", "n", "no", "f", "false", "off", "0"}:
        raise ValueError(text)
    return lowered in {"y", "yes", "t", "true", "on", "1"}


_UNIT_TYPES: dict[str, Any] = {"INT": int, "FLOAT": float, "DOUBLE": float, "STRING": str, "BOOL": _boolean}


def _unit_parameters(text: str) -> dict[str, Any]:
    """Seldon Core v1: a JSON list of `{name, value, type}`."""
    if not text.strip():
        return {}
    try:
        parameters = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidSettings(f"got invalid JSON ({error}), expected a list @ {UNIT_PARAMETERS}") from None
    if not isinstance(parameters, list):
        raise InvalidSettings(f"got {parameters!r:.80}, expected a JSON list @ {UNIT_PARAMETERS}")
    return dict(_unit_parameter(parameter) for parameter in parameters)


def _unit_parameter(parameter: Any) -> tuple[str, Any]:
    if not isinstance(parameter, dict) or not {"name", "value", "type"} <= set(parameter):
        raise InvalidSettings(f"got {parameter!r:.80}, expected name, value and type @ {UNIT_PARAMETERS}")
    name, value, kind = parameter["name"], parameter["value"], parameter["type"]
    if kind not in _UNIT_TYPES:
        raise InvalidSettings(f"got the type {kind!r}, expected one of {', '.join(_UNIT_TYPES)} @ {name}")
    try:
        return str(name), _UNIT_TYPES[kind](str(value))
    except ValueError:
        raise InvalidSettings(f"got {value!r}, expected a value of type {kind} @ {name}") from None
