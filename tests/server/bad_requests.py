"""Requests that are wrong, each with what the answer says of it."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlserver.grpc import dataplane_pb2 as pb

from tests.server.conftest import LONG
from tests.server.v2 import tensor, texts

LOVED = "I loved this film"
GOOD = texts(LOVED)

# -- what JSON and gRPC messages can both say -----------------------------------------------------


@dataclass(frozen=True)
class Case:
    name: str
    inputs: Sequence[Mapping[str, Any]]
    says: str
    status: int = 400
    model: str = "sentiment"
    outputs: Sequence[str] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)


def labels_for_zero_shot(*labels: str) -> list[dict[str, Any]]:
    return [*GOOD, tensor("candidate_labels", list(labels))]


CASES = [
    Case(
        "input name",
        [tensor("inputz", ["a"])],
        "unknown input or parameter 'inputz', did you mean 'inputs'? @ inputz",
    ),
    Case("no inputs", [], "no input, expected"),
    Case("only a parameter", [tensor("top_k", [2], "INT64")], "no input, expected"),
    Case("input twice", [*GOOD, *texts("b", name="args")], "came twice"),
    Case("two kinds of input", [*GOOD, tensor("text", ["a"])], "both inputs and text"),
    Case("empty batch", [tensor("inputs", [])], "an empty batch, expected 1..1024 items @ inputs"),
    Case("empty raw tensor", [tensor("inputs", [], content_type="raw")], "an empty tensor"),
    Case("shape too large", [tensor("inputs", ["a"], shape=[2])], "1 elements, expected 2"),
    Case("shape too small", [tensor("inputs", ["a", "b", "c"], shape=[2])], "3 elements, expected 2"),
    Case("shape of too many sizes", [tensor("inputs", ["a", "b"], shape=[2, 2])], "2 elements, expected 4"),
    Case(
        "shape below zero",
        [tensor("inputs", ["a"], shape=[-2])],
        "got the shape [-2], expected a list of sizes",
    ),
    Case("shape beyond memory", [tensor("inputs", ["a"], shape=[2**60])], "expected a list of sizes"),
    Case(
        "shape of many dimensions", [tensor("inputs", ["a"], shape=[1] * 400)], "got the shape 400 dimensions"
    ),
    Case("a long name", [tensor("é" * 5000, ["a"])], "a name of 5000 characters"),
    Case("a name of several lines", [tensor("a\nb", ["a"])], "unknown input or parameter 'a b'"),
    Case(
        "JSON nested too deeply",
        [tensor("inputs", ["[" * 900 + "]" * 900], content_type="hg_json")],
        "nested",
    ),
    Case(
        "many inputs", [tensor(f"a{i}", ["a"]) for i in range(65)], "65 inputs, expected at most 64 @ inputs"
    ),
    Case("numbers as texts", [tensor("inputs", [1, 2], "INT64")], "got int 1, expected a text @ inputs[0]"),
    Case("floats as texts", [tensor("inputs", [1.5], "FP32")], "expected a text @ inputs[0]"),
    Case("arrays as texts", [tensor("inputs", [1.5], "FP32", "np")], "expected a text @ inputs[0]"),
    Case("texts as an array", [tensor("inputs", ["a"], content_type="np")], "got the datatype BYTES"),
    Case(
        "bytes as texts",
        [tensor("inputs", ["aGk="], content_type="base64")],
        "got bytes b'hi', expected a text",
    ),
    Case(
        "content type",
        [tensor("inputs", ["a"], content_type="strr")],
        "unknown content type 'strr', did you mean 'str'?",
    ),
    Case("base64", [tensor("inputs", ["&&"], content_type="base64")], "invalid base64"),
    Case(
        "no image", [tensor("inputs", ["aGk="], content_type="pillow_image")], "an image that cannot be read"
    ),
    Case(
        "image among texts",
        [tensor("inputs", ['{"text": "data:image/png;base64,aGk="}'], content_type="hg_json")],
        "an image",
    ),
    Case("JSON", [tensor("inputs", ['{"a":'], content_type="hg_json")], "invalid JSON"),
    Case("JSON list", [tensor("inputs", ['"a"', "b"], content_type="hg_jsonlist")], "invalid JSON"),
    Case("JSON too deep", [tensor("inputs", ["[" * 100_000], content_type="hg_json")], "invalid JSON"),
    Case(
        "JSON number",
        [tensor("inputs", ["1"], content_type="hg_json")],
        "got int 1, expected a text @ inputs[0]",
    ),
    Case("JSON keys", [tensor("inputs", ['{"txt": "a"}'], content_type="hg_json")], "got the keys ['txt']"),
    Case(
        "pairs of unequal number",
        [tensor("text", ["a"]), tensor("text_pair", ["b", "c"])],
        "got 2 second texts, expected 1",
    ),
    Case(
        "output name",
        GOOD,
        "unknown output 'labels', did you mean 'label'? @ outputs",
        outputs=["label", "labels"],
    ),
    Case(
        "parameter name",
        GOOD,
        "unknown input or parameter 'topk', did you mean 'top_k'? @ topk",
        parameters={"topk": 2},
    ),
    Case("parameter tensor name", [*GOOD, tensor("topk", [2], "INT64")], "did you mean 'top_k'?"),
    Case(
        "parameter value",
        GOOD,
        "got 0, expected: input should be greater than or equal to 1 @ top_k",
        parameters={"top_k": 0},
    ),
    Case("parameter type", GOOD, "got 'two', expected", parameters={"top_k": "two"}),
    Case("parameter choice", GOOD, "got 'relu', expected", parameters={"function_to_apply": "relu"}),
    Case(
        "parameter of two values", [*GOOD, tensor("top_k", [2, 3], "INT64")], "2 values, expected one @ top_k"
    ),
    Case("parameter of no value", [*GOOD, tensor("top_k", [], "INT64")], "0 values, expected one @ top_k"),
    Case("parameter with a fraction", [*GOOD, tensor("top_k", [2.5], "FP32")], "got 2.5, expected"),
    Case(
        "parameter tensor in JSON", [*GOOD, tensor("top_k", ['{"a": 2}'], content_type="hg_json")], "@ top_k"
    ),
    Case(
        "parameter beyond a limit",
        GOOD,
        "got 129, expected 1..128 @ max_length",
        parameters={"max_length": 129},
    ),
    Case(
        "timeout of the past",
        GOOD,
        "expected: input should be greater than 0 @ timeout_ms",
        parameters={"timeout_ms": -1},
    ),
    Case(
        "remote code",
        GOOD,
        "unknown input or parameter 'trust_remote_code'",
        parameters={"trust_remote_code": True},
    ),
    Case(
        "too many tokens",
        texts(LONG * 10),
        "expected at most 128: shorten it, or send the parameter truncation=true",
    ),
    Case("too many items", texts(*"abcde"), "5 items, expected at most 4 @ inputs", 413, "limited"),
    Case(
        "too many characters",
        texts("a", "b" * 301),
        "a text of 301 characters, expected at most 300 @ inputs[1]",
        413,
        "limited",
    ),
    Case("no mask", texts("no mask here"), "expected '[MASK]' @ inputs[0]", model="mask"),
    Case("target", texts("I [MASK] it"), "@ targets", model="mask", parameters={"targets": "[1]"}),
    Case("no labels", GOOD, "candidate_labels", model="zero-shot"),
    Case("empty labels", labels_for_zero_shot(), "candidate_labels", model="zero-shot"),
    Case(
        "template",
        labels_for_zero_shot("a"),
        "@ hypothesis_template",
        model="zero-shot",
        parameters={"hypothesis_template": "no place"},
    ),
    Case("no context", [tensor("question", ["who?"])], "context", model="answers"),
    Case(
        "empty context", [tensor("question", ["who?"]), tensor("context", [""])], "context", model="answers"
    ),
    Case(
        "strategy", GOOD, "got 'best', expected", model="tokens", parameters={"aggregation_strategy": "best"}
    ),
    Case("no query", [tensor("texts", ["a"])], "query", model="ranking"),
    Case("pooling", GOOD, "got 'median', expected", model="embeddings", parameters={"pooling": "median"}),
]


# -- bodies that are JSON, and bodies that are not ------------------------------------------------

TENSOR = {"name": "inputs", "shape": [1], "datatype": "BYTES", "data": ["a"]}


def with_tensor(**changes: Any) -> dict[str, Any]:
    """A body whose tensor has other values for some keys; `...` takes the key away."""
    changed = {key: value for key, value in {**TENSOR, **changes}.items() if value is not ...}
    return {"inputs": [changed]}


def nested(levels: int) -> list[Any]:
    value: list[Any] = ["a"]
    for _ in range(levels):
        value = [value]
    return value


BODIES: list[tuple[str, Any, str]] = [
    ("list", [1], "no list of inputs"),
    ("no inputs key", {}, "no list of inputs"),
    ("inputs null", {"inputs": None}, "no list of inputs"),
    ("tensor null", {"inputs": [None]}, "a tensor without a name"),
    ("no name", with_tensor(name=...), "a tensor without a name"),
    ("name null", with_tensor(name=None), "a tensor without a name"),
    ("name a number", with_tensor(name=5), "a tensor without a name"),
    ("no shape", with_tensor(shape=...), "got the shape None"),
    ("shape a text", with_tensor(shape="1"), "got the shape '1'"),
    ("shape of floats", with_tensor(shape=[1.0]), "got the shape [1.0]"),
    ("shape of booleans", with_tensor(shape=[True]), "got the shape [True]"),
    ("shape astronomic", with_tensor(shape=[10**30]), "got the shape"),
    ("id of several lines", {**with_tensor(), "id": "a\nb"}, "printable ASCII"),
    ("id of an emoji", {**with_tensor(), "id": "\N{GRINNING FACE}"}, "printable ASCII"),
    ("data nested too deeply", with_tensor(data=nested(500)), "nested deeper"),
    ("shape nested too deeply", with_tensor(shape=nested(900)), "got the shape"),
    ("parameter nested too deeply", {**with_tensor(), "parameters": {"top_k": nested(900)}}, "@ top_k"),
    ("no datatype", with_tensor(datatype=...), "got the datatype 'None'"),
    (
        "datatype unknown",
        with_tensor(datatype="STRING"),
        "got the datatype 'STRING', expected one of BOOL, BYTES",
    ),
    ("datatype near", with_tensor(datatype="INT46"), "did you mean 'INT64'?"),
    ("datatype a list", with_tensor(datatype=["BYTES"]), "got the datatype"),
    ("no data", with_tensor(data=...), "a tensor without data"),
    ("data an object", with_tensor(data={"a": 1}), "expected a text @ inputs[0]"),
    ("data a number", with_tensor(data=3), "got int 3, expected a text @ inputs[0]"),
    ("element null", with_tensor(data=[None]), "got NoneType None, expected a text @ inputs[0]"),
    ("element a number", with_tensor(data=[1]), "got int 1, expected a text @ inputs[0]"),
    ("element a boolean", with_tensor(data=[True]), "expected a text @ inputs[0]"),
    (
        "texts as numbers",
        with_tensor(datatype="INT64"),
        "got 'a', expected a value of the datatype INT64 @ inputs[0]",
    ),
    (
        "number over its type",
        with_tensor(datatype="UINT8", data=[300], parameters={"content_type": "np"}),
        "uint8",
    ),
    (
        "content type a number",
        with_tensor(parameters={"content_type": 5}),
        "@ inputs[0].parameters.content_type",
    ),
    ("tensor parameters a list", with_tensor(parameters=[1]), "expected an object @ inputs[0].parameters"),
    ("id a number", {**with_tensor(), "id": 5}, "expected a text @ id"),
    ("parameters a list", {**with_tensor(), "parameters": [1]}, "expected an object @ parameters"),
    (
        "request content type a number",
        {**with_tensor(), "parameters": {"content_type": 5}},
        "@ parameters.content_type",
    ),
    ("headers a text", {**with_tensor(), "parameters": {"headers": "a"}}, "@ parameters.headers"),
    ("parameter a list", {**with_tensor(), "parameters": {"top_k": [2]}}, "got [2], expected"),
    ("parameter an object", {**with_tensor(), "parameters": {"top_k": {}}}, "@ top_k"),
    ("parameter beyond 64 bits", {**with_tensor(), "parameters": {"top_k": 10**40}}, "@ top_k"),
    ("outputs an object", {**with_tensor(), "outputs": {"name": "label"}}, "expected a list @ outputs"),
    (
        "outputs of texts",
        {**with_tensor(), "outputs": ["label"]},
        "expected an output with a name @ outputs[0]",
    ),
    (
        "output without a name",
        {**with_tensor(), "outputs": [{}]},
        "expected an output with a name @ outputs[0]",
    ),
    (
        "output parameters a list",
        {**with_tensor(), "outputs": [{"name": "label", "parameters": [1]}]},
        "@ outputs[0].parameters",
    ),
]


VALID = json.dumps(with_tensor()).encode()
BYTES: list[tuple[str, bytes, dict[str, str], str]] = [
    ("empty", b"", {}, "an empty body"),
    ("null", b"null", {}, "no list of inputs"),
    ("cut off", VALID[:-3], {}, "invalid JSON"),
    ("not UTF-8", VALID.replace(b'"a"', b'"\xff"'), {}, "invalid JSON"),
    ("lone surrogate", VALID.replace(b'"a"', b'"\\ud800"'), {}, "invalid JSON"),
    ("NaN", VALID.replace(b'"a"', b"NaN"), {}, "invalid JSON"),
    ("infinity", VALID.replace(b'"a"', b"1e999"), {}, "invalid JSON"),
    ("deep", b"[" * 100_000, {}, "invalid JSON"),
    (
        "form",
        VALID,
        {"Content-Type": "application/x-www-form-urlencoded"},
        "expected application/json @ body",
    ),
    ("text", VALID, {"Content-Type": "text/plain"}, "expected application/json @ body"),
    ("nonsense type", VALID, {"Content-Type": ";;"}, "expected application/json @ body"),
    ("no gzip", VALID, {"Content-Encoding": "gzip"}, "a body that is not gzip"),
    ("gzip cut off", gzip.compress(VALID)[:-4], {"Content-Encoding": "gzip"}, "not one whole gzip stream"),
    ("empty gzip", gzip.compress(b""), {"Content-Encoding": "gzip"}, "an empty body"),
    ("deflate", zlib.compress(VALID), {"Content-Encoding": "deflate"}, "expected gzip or none @ body"),
]


# -- gRPC messages, as changes of a good one -------------------------------------------------------


def set_datatype(message: Any) -> None:
    message.inputs[0].datatype = "STRING"


def two_contents(message: Any) -> None:
    message.inputs[0].contents.ClearField("bytes_contents")
    message.inputs[0].contents.int64_contents.append(4)


def not_utf8(message: Any) -> None:
    message.inputs[0].contents.bytes_contents[0] = b"\xff\xfe"


def no_contents(message: Any) -> None:
    message.inputs[0].ClearField("contents")


def empty_parameter(message: Any) -> None:
    message.parameters["top_k"].CopyFrom(pb.InferParameter())


def content_type_a_number(message: Any) -> None:
    message.inputs[0].parameters["content_type"].int64_param = 5


def raw_of(contents: bytes, datatype: str = "BYTES", size: int = 1) -> Callable[[Any], None]:
    def change(message: Any) -> None:
        message.inputs[0].ClearField("contents")
        message.inputs[0].datatype = datatype
        message.inputs[0].shape[:] = [size]
        message.raw_input_contents.append(contents)

    return change


def raw_too_few(message: Any) -> None:
    raw_of(struct.pack("<I", 1) + b"a")(message)
    message.inputs.append(pb.ModelInferRequest.InferInputTensor(name="top_k", datatype="INT64", shape=[1]))


def id_of_several_lines(message: Any) -> None:
    message.id = "a\nb"


MESSAGES: list[tuple[str, Callable[[Any], None], str]] = [
    ("id of several lines", id_of_several_lines, "printable ASCII"),
    ("datatype", set_datatype, "got the datatype 'STRING'"),
    ("contents of another type", two_contents, "got int 4, expected a text @ inputs[0]"),
    ("not UTF-8", not_utf8, "bytes that are not UTF-8"),
    ("no contents", no_contents, "@ inputs"),
    ("parameter of no kind", empty_parameter, "@ top_k"),
    ("content type a number", content_type_a_number, "a message that cannot be read"),
    ("raw cut off", raw_of(b"\x05\x00"), "a message that cannot be read"),
    ("raw length beyond its end", raw_of(b"\xff\xff\xff\xff"), "a message that cannot be read"),
    ("raw of another size", raw_of(b"abc", "INT64"), "a message that cannot be read"),
    ("raw of a size below zero", raw_of(b"abcdefgh", "INT64", -1), "a message that cannot be read"),
    ("raw of a size beyond memory", raw_of(b"abcdefgh", "INT64", 2**61), "a message that cannot be read"),
    ("raw of an unknown datatype", raw_of(b"abc", "FOO"), "a message that cannot be read"),
    ("raw not UTF-8", raw_of(struct.pack("<I", 2) + b"\xff\xfe"), "bytes that are not UTF-8"),
    ("raw too few", raw_too_few, "a message that cannot be read"),
]
