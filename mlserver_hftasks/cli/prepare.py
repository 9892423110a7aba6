"""`hftasks prepare`: a model made faster, proven, and written as a folder that is served as it is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mlserver_hftasks.cli.edge import console, one_line, quiet
from mlserver_hftasks.cli.report import Report, Side
from mlserver_hftasks.cli.texts import Item, own_items, read_items, texts_of
from mlserver_hftasks.cli.trial import Difference, Speed, Tried, difference, speeds, tried
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.loading import load, memory
from mlserver_hftasks.loading.cache import new_folder
from mlserver_hftasks.loading.manifest import WEIGHTS
from mlserver_hftasks.loading.source import Source
from mlserver_hftasks.runtime.folder import FILE, IMPLEMENTATIONS
from mlserver_hftasks.settings import Quantization, Settings, read_settings
from mlserver_hftasks.tasks.registry import canonical_name

HELP = """
Export, optimize or quantize a model, compare it with the original, and write a folder to serve.

    hftasks prepare distilbert/distilbert-base-uncased-finetuned-sst-2-english models/sst2 \\
        --task text-classification --quantize int8 --check held-out.txt

    hftasks prepare ./my-model models/ner --task token-classification --backend onnx

    hftasks prepare ./my-decoder models/writer --task text-generation --backend onnx

    hftasks prepare ./my-model models/fast --task text-classification --backend export --compile

    mlserver start models/sst2

SOURCE is an id of the hub or a folder, OUT a folder that is not there yet. A file of texts has one per
line; `.jsonl` a text or an object per line, such as `{"question": "...", "context": "..."}`; `.tsv` and
`.csv` a column `text`.
"""
LOADING, WRITING, READING, COMPARING, TIMING = STEPS = (
    "loading the model in float32",
    "writing the prepared model",
    "loading what was written",
    "comparing",
    "timing",
)
"""Each moves the bar on; what a backend tells in between is only shown."""

Backend = Literal["torch", "onnx", "openvino", "export"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Advance = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What shall be made, checked before anything is read."""

    settings: Settings
    """With the source as its model."""
    items: Sequence[Item]
    calibration: Sequence[str]

    @property
    def reference(self) -> Settings:
        """The model itself: float32 on torch, on the CPU."""
        plain = {"backend": "torch", "quantization": None, "dtype": "float32", "compile": None}
        return self.settings.model_copy(update=plain)

    def served(self) -> dict[str, Any]:
        """`parameters.extra` of the prepared folder."""
        named = self.settings.model_dump(
            include={"task", "backend", "quantization", "dtype", "intra_op_threads", "trust_remote_code"},
            exclude_defaults=True,
        )
        if self.settings.compile is not None:
            named["compile"] = self.settings.compile.enable
        return {name: value for name, value in named.items() if value != "none"}


def command(
    source: Annotated[str, typer.Argument(help="Id of the hub, or folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    task: Annotated[str, typer.Option(help="Such as text-classification.", show_default=False)],
    backend: Annotated[Backend, typer.Option(help="What will run the model.")] = "torch",
    quantize: Annotated[Quantization, typer.Option(help="int8-static needs --calibrate.")] = "none",
    compile_program: Annotated[
        bool, typer.Option("--compile", help="To machine code for this CPU, with --backend export.")
    ] = False,
    dtype: Annotated[Dtype, typer.Option(help="With the backend torch.")] = "auto",
    calibrate: Annotated[Path | None, typer.Option(help="Texts for int8-static.", show_default=False)] = None,
    check: Annotated[
        Path | None, typer.Option(help="Texts to compare and time on.", show_default=False)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of an operator.", show_default=False)
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of the hub.", show_default=False)] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
) -> None:
    """See `HELP`."""
    with one_line():
        extra = {
            "task": canonical_name(task),
            "pretrained_model": source,
            "backend": backend,
            "quantization": quantize,
            "dtype": dtype,
            "compile": compile_program or None,
            "revision": revision,
            "intra_op_threads": threads,
            "trust_remote_code": trust_remote_code,
        }
        wanted = Wanted(
            read_settings(extra, {}),
            own_items(canonical_name(task)) if check is None else read_items(check),
            [] if calibrate is None else texts_of(read_items(calibrate)),
        )
        with quiet(), _progress() as advance:
            report = prepare(wanted, out, advance)
        console.print(report.table())
        console.print(f"[green]{out} is ready:[/] mlserver start {out}", highlight=False)


def prepare(wanted: Wanted, out: Path, advance: Advance = lambda step: None) -> Report:
    """Make the folder `out`, or nothing at all. Raises `HFTasksError`."""
    if out.exists():
        raise InvalidSettings("it is there already, expected a folder that is not, to be made @ " + str(out))
    memory.manage()
    with new_folder(out.resolve()) as folder:
        advance(LOADING)
        before, loaded_before = _tried(wanted.reference)
        rows = before.rows(wanted.items)
        expected = before.outputs(rows)
        advance(WRITING)
        _write_model(wanted, folder, advance)
        _write_settings(wanted, folder, out.resolve().name)
        advance(READING)
        after, loaded_after = _tried(
            wanted.settings.model_copy(update={"pretrained_model": str(folder), "revision": None})
        )
        advance(COMPARING)
        apart = difference(after.outputs(rows), expected, headless=_is_headless(before))
        advance(TIMING)
        speed = speeds({"before": before, "after": after}, rows)
        report = _report(wanted, folder, rows, (before, after), (loaded_before, loaded_after), speed, apart)
        before.served.close()
        after.served.close()
        report.write(folder)
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # a server may run as another user
    return report


def _tried(settings: Settings) -> tuple[Tried, float]:
    began = time.monotonic()
    served = load(settings)
    took = time.monotonic() - began
    return tried(served), took


def _is_headless(trial: Tried) -> bool:
    return trial.served.task.head.auto_class == "AutoModel"


def _write_model(wanted: Wanted, folder: Path, advance: Advance) -> None:
    """Import late: an exporter takes seconds to import, and needs packages that may be missing."""
    if wanted.settings.chosen_backend in (None, "torch"):
        from mlserver_hftasks.loading.saving import save_model

        save_model(wanted.settings, folder, tell=advance)
    else:
        from mlserver_hftasks.loading.programs import export_program

        export_program(wanted.settings, folder, calibration=wanted.calibration, tell=advance)


def _write_settings(wanted: Wanted, folder: Path, name: str) -> None:
    content = {
        "name": name,
        "implementation": IMPLEMENTATIONS[0],
        "parameters": {"uri": ".", "extra": wanted.served()},
    }
    (folder / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _report(
    wanted: Wanted,
    folder: Path,
    rows: Sequence[Any],
    trials: tuple[Tried, Tried],
    loaded_s: tuple[float, float],
    speed: Mapping[str, Speed],
    apart: Difference,
) -> Report:
    sizes = _weights_bytes(wanted.reference), _bytes(folder.rglob("*"))
    before, after = (
        Side(trial.served.description, seconds, size, speed[name])
        for trial, seconds, size, name in zip(trials, loaded_s, sizes, ("before", "after"), strict=True)
    )
    return Report(
        task=wanted.settings.task or "",
        source=wanted.settings.pretrained_model or "",
        quantization=wanted.settings.quantization or "none",
        rows=len(rows),
        unit=trials[0].unit,
        before=before,
        after=after,
        difference=apart,
        threads=torch.get_num_threads(),
    )


def _weights_bytes(settings: Settings) -> int:
    folder = Source(settings).weights_folder()
    return _bytes(path for pattern in WEIGHTS for path in folder.glob(pattern))


def _bytes(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


@contextmanager
def _progress() -> Iterator[Advance]:
    """A bar on the terminal; called with what begins now."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} of {task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(STEPS))

        def advance(step: str) -> None:
            done = STEPS.index(step) if step in STEPS else None
            progress.update(bar, description=step, completed=done)

        yield advance
