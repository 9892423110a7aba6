"""Serve the two example models on MLServer, ask them questions over REST and gRPC, and keep serving.

    python -m examples.demo [FOLDER] [--check]

With `--check` every answer is compared with what it should be, and the exit status says whether all were.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import httpx
import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from examples.build_models import build
from mlserver_hftasks.cli.heat_map import heat_maps
from mlserver_hftasks.client import Reading, explain, read

READY_SECONDS = 180
STOP_SECONDS = 20
LOG_LINES = 30

# Each sentence with the label that it should get.
REVIEWS = {
    "This is terrible!": "NEGATIVE",
    "What a wonderful day we had at the lake.": "POSITIVE",
    "The soup was delicious and the waiter was so kind.": "POSITIVE",
    "It crashed twice and I lost all my work.": "NEGATIVE",
    "I expected little, but this film is brilliant.": "POSITIVE",
}
# The review that the model has to explain.
EXPLAINED = "I expected little, but this film is brilliant."
QUESTION = "How do I get my money back?"
# From the best answer to the worst.
PASSAGES = (
    "Refunds are paid to your card within five days.",
    "You can change the delivery address of an order in the shop.",
    "The mountains are covered with snow in winter.",
)

console = Console()
Tensors = dict[str, NDArray[Any]]


class Ports(NamedTuple):
    """Where the server listens."""

    http: int
    grpc: int
    metrics: int


class Answers(NamedTuple):
    """All that the models said, by the way they were asked."""

    plain: list[dict[str, Any]]
    ranked: list[dict[str, Any]]
    typed: Tensors
    rest_vectors: NDArray[Any]
    grpc_vectors: NDArray[Any]
    why: Reading
    why_by_grpc: Reading


class Clients:
    """A REST and a gRPC client of one server, both speaking the V2 inference protocol."""

    def __init__(self, ports: Ports) -> None:
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{ports.http}", timeout=60, trust_env=False)
        self.grpc = triton.InferenceServerClient(f"127.0.0.1:{ports.grpc}")

    def close(self) -> None:
        """Close both connections."""
        self.http.close()
        self.grpc.close()

    def live(self) -> bool:
        """Whether both doors report a live server."""
        return self.http.get("/v2/health/live").is_success and bool(self.grpc.is_server_live())

    def ask_rest(
        self, model: str, tensor: str, texts: Sequence[str], outputs: Sequence[str] = (), **parameters: Any
    ) -> Tensors:
        """Send `texts` as one JSON request; without `outputs` each answer comes back as a JSON string."""
        body: dict[str, Any] = {
            "inputs": [
                {
                    "name": tensor,
                    "shape": [len(texts)],
                    "datatype": "BYTES",
                    "parameters": {"content_type": "str"},
                    "data": list(texts),
                }
            ]
        }
        if outputs:
            body["outputs"] = [{"name": name} for name in outputs]
        if parameters:
            body["parameters"] = parameters
        response = self.http.post(f"/v2/models/{model}/infer", json=body)
        if response.is_error:
            raise SystemExit(f"{model} answered {response.status_code}: {response.text}")
        return {output["name"]: tensor_of(output) for output in response.json()["outputs"]}

    def ask_grpc(self, model: str, tensor: str, texts: Sequence[str], outputs: Sequence[str]) -> Tensors:
        """Send `texts` as one protobuf message, and have the named tensors come back as numbers."""
        response = self._infer(model, tensor, texts, outputs)
        return {name: response.as_numpy(name) for name in outputs}

    def explain_grpc(self, model: str, tensor: str, texts: Sequence[str], **options: Any) -> list[Reading]:
        """Ask for explanations beside the predictions; over gRPC options travel as JSON text."""
        return read(self._infer(model, tensor, texts, ["explanation"], explain=json.dumps(options)))

    def _infer(
        self, model: str, tensor: str, texts: Sequence[str], outputs: Sequence[str], **parameters: Any
    ) -> Any:
        question = triton.InferInput(tensor, [len(texts)], "BYTES")
        question.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=object))
        wanted = [triton.InferRequestedOutput(name) for name in outputs]
        return self.grpc.infer(model, [question], outputs=wanted, parameters=parameters or None)


def tensor_of(output: dict[str, Any]) -> NDArray[Any]:
    """The array in one output of a JSON answer."""
    dtype = object if output["datatype"] == "BYTES" else np.float32
    return np.array(output["data"], dtype=dtype).reshape(output["shape"])


def ask(clients: Clients) -> Answers:
    """Put every question of the demo."""
    texts = list(REVIEWS)
    passages = [QUESTION, *PASSAGES]
    plain = clients.ask_rest("sentiment", "args", texts)["output"]
    ranked = clients.ask_rest("sentiment", "array_inputs", texts[:1], top_k=2)["output"]
    typed = clients.ask_grpc("sentiment", "array_inputs", texts, ["label", "score"])
    by_rest = clients.ask_rest("embeddings", "array_inputs", passages, ["embedding"])
    by_grpc = clients.ask_grpc("embeddings", "array_inputs", passages, ["embedding"])
    (why,) = explain("/v2/models/sentiment", [EXPLAINED], client=clients.http)
    (why_by_grpc,) = clients.explain_grpc("sentiment", "array_inputs", [EXPLAINED], target="predicted")
    return Answers(
        plain=[json.loads(item) for item in plain.flat],
        ranked=json.loads(ranked.flat[0]),
        typed={name: tensor.reshape(-1) for name, tensor in typed.items()},
        rest_vectors=by_rest["embedding"],
        grpc_vectors=by_grpc["embedding"],
        why=why,
        why_by_grpc=why_by_grpc,
    )


def similarities(vectors: NDArray[Any]) -> list[float]:
    """The cosine of the first vector with each of the others; they are all of length one."""
    return [float(value) for value in vectors[1:] @ vectors[0]]


def labels(typed: Tensors) -> list[str]:
    """The label tensor as text: over gRPC strings travel as bytes."""
    return [label.decode() for label in typed["label"]]


def show(answers: Answers) -> None:
    """Print the questions and answers."""
    table = Table("text", "REST", "gRPC", title="sentiment: text-classification")
    for text, said, label, score in zip(
        REVIEWS, answers.plain, labels(answers.typed), answers.typed["score"], strict=True
    ):
        table.add_row(text, verdict(said["label"], said["score"]), verdict(label, score))
    console.print(table)
    both = ", ".join(verdict(said["label"], said["score"]) for said in answers.ranked)
    console.print(f'With "top_k": 2, "{next(iter(REVIEWS))}" is {both}.\n')

    table = Table(QUESTION, "REST", "gRPC", title="embeddings: cosine similarity of sentence-embedding")
    rest, grpc = similarities(answers.rest_vectors), similarities(answers.grpc_vectors)
    for passage, by_rest, by_grpc in zip(PASSAGES, rest, grpc, strict=True):
        table.add_row(passage, f"{by_rest:.3f}", f"{by_grpc:.3f}")
    console.print(table)

    console.print("\nsentiment explains itself: POST /v2/models/sentiment/explain")
    for heat_map in heat_maps(answers.why):
        console.print(heat_map)


def verdict(label: str, score: float) -> str:
    """A label and its score, in the label's colour."""
    colour = "green" if label == "POSITIVE" else "red"
    return f"[{colour}]{label}[/] {score:.3f}"


def wrong_answers(answers: Answers, *, live: bool) -> list[str]:
    """What is wrong with the answers; empty when nothing is."""
    expected = list(REVIEWS.values())
    scores = [said["score"] for said in answers.plain]
    rest, grpc = similarities(answers.rest_vectors), similarities(answers.grpc_vectors)
    top = [said["label"] for said in answers.ranked]
    (why,), words = answers.why.targets, answers.why.words()
    explained = why.score - why.baseline_score + why.delta
    checks = {
        "the server reports that it is live": live,
        "the labels over REST are right": [said["label"] for said in answers.plain] == expected,
        "the labels over gRPC are right": labels(answers.typed) == expected,
        "the scores over REST and gRPC agree": close(scores, answers.typed["score"]),
        "top_k=2 gives both labels, the right one first": top == ["NEGATIVE", "POSITIVE"],
        "the scores of both labels add up to one": close(sum(said["score"] for said in answers.ranked), 1.0),
        "the embeddings have 384 numbers each": answers.rest_vectors.shape == (len(PASSAGES) + 1, 384),
        "the embeddings have length one": close(np.linalg.norm(answers.rest_vectors, axis=1), 1.0, 1e-4),
        "the embeddings over REST and gRPC agree": close(answers.rest_vectors, answers.grpc_vectors),
        "the passages are ranked by meaning": rest == sorted(rest, reverse=True),
        "the passages are ranked the same over gRPC": grpc == sorted(grpc, reverse=True),
        "the explanation is of the label": why.label == REVIEWS[EXPLAINED],
        "the word that decides is found": max(words, key=lambda word: word.attribution).text == "brilliant",
        "the words add up to the score": close(sum(word.attribution for word in words), explained, 1e-3),
        "the explanation has converged": why.converged,
        "the explanations over REST and gRPC agree": close(
            why.attributions, answers.why_by_grpc.targets[0].attributions, 1e-4
        ),
    }
    return [claim for claim, holds in checks.items() if not holds]


def close(one: Any, other: Any, tolerance: float = 1e-5) -> bool:
    """Whether two arrays, or an array and a number, agree throughout."""
    return bool(np.allclose(one, other, rtol=0, atol=tolerance))


@contextmanager
def serving(models: Path, ports: Ports) -> Iterator[subprocess.Popen[bytes]]:
    """Run MLServer on `models` for as long as the block lasts."""
    with tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "server.log").open("w+b") as log:
        server = subprocess.Popen(
            [str(Path(sys.executable).with_name("mlserver")), "start", str(models)],
            env=environment(ports, Path(scratch)),
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches every process of a terminal's group; the server is to get one signal, from us.
            start_new_session=True,
        )
        try:
            yield server
            if server.poll() is not None:
                raise SystemExit(f"MLServer ended with status {server.returncode}")
        except (Exception, SystemExit):
            show_tail(log)
            raise
        finally:
            stop(server)


def show_tail(log: BinaryIO) -> None:
    """Print the end of the server's log."""
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    print("The end of MLServer's log:", *lines[-LOG_LINES:], sep="\n  ", flush=True)


def environment(ports: Ports, scratch: Path) -> dict[str, str]:
    """The server's settings: these ports, this machine only unless told otherwise, no network for models."""
    return {
        "MLSERVER_HOST": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        **os.environ,
        "MLSERVER_HTTP_PORT": str(ports.http),
        "MLSERVER_GRPC_PORT": str(ports.grpc),
        "MLSERVER_METRICS_PORT": str(ports.metrics),
        "MLSERVER_METRICS_DIR": str(scratch / "metrics"),
    }


def stop(server: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, and make it."""
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def wait_until_ready(clients: Clients, server: subprocess.Popen[bytes]) -> bool:
    """Wait for the models to load; false when the server ended instead."""
    deadline = time.monotonic() + READY_SECONDS
    while server.poll() is None:
        try:
            if clients.http.get("/v2/health/ready").is_success:
                return True
        except httpx.TransportError:
            pass  # it does not listen yet
        if time.monotonic() > deadline:
            raise SystemExit(f"MLServer was not ready within {READY_SECONDS} seconds")
        time.sleep(0.2)
    return False


def choose_ports() -> Ports:
    """MLServer's own ports where they are free, and any others where not."""
    return Ports(*(port if is_free(port) else free_port() for port in (8080, 8081, 8082)))


def is_free(port: int) -> bool:
    """Whether nothing listens on `port`."""
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A port that the system says is free."""
    with closing(socket.socket()) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def show_urls(ports: Ports) -> None:
    """Say where the server is, and how to ask it something by hand."""
    body = {"inputs": [{"name": "array_inputs", "shape": [1], "datatype": "BYTES", "data": ["So good!"]}]}
    base = f"http://localhost:{ports.http}/v2"
    for name, url in {
        "REST": base,
        "docs": f"{base}/docs",
        "gRPC": f"localhost:{ports.grpc}",
        "metrics": f"http://localhost:{ports.metrics}/metrics",
    }.items():
        print(f"{name:8} {url}")
    print(f"\ncurl -s {base}/models/sentiment/infer -H 'content-type: application/json' \\")
    print(f"  -d '{json.dumps(body)}'\n")


def demonstrate(models: Path, *, check: bool) -> list[str]:
    """Serve, ask and show; then verify the answers, or keep serving until interrupted."""
    ports = choose_ports()
    with serving(models, ports) as server, closing(Clients(ports)) as clients:
        console.print(f"Starting MLServer on {models}/ ...")
        if not wait_until_ready(clients, server):
            return []
        answers = ask(clients)
        show(answers)
        if check:
            return wrong_answers(answers, live=clients.live())
        show_urls(ports)
        print("Serving until Ctrl-C.", flush=True)
        server.wait()
    return []


def interrupt(*_: object) -> None:
    """Treat SIGTERM as Ctrl-C, so that the server is stopped on either."""
    raise KeyboardInterrupt


def main() -> int:
    """Run the demo; the exit status is 1 when `--check` finds a wrong answer."""
    parser = argparse.ArgumentParser(description="Serve the example models and ask them questions.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("models"), help="default: models/")
    parser.add_argument("--check", action="store_true", help="verify the answers and stop")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        build(options.folder)
        wrong = demonstrate(options.folder, check=options.check)
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 1 if options.check else 0
    for claim in wrong:
        console.print(f"[red]wrong:[/] it does not hold that {claim}")
    if options.check and not wrong:
        console.print("[green]Every answer is right.[/]")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
