"""Models that were exported: run the program, and make it where there is none.

find_program (manifest)     a program in the model's folder: ours, or Optimum's
provide_program             else from the hub, else exported once into the cache
export_program              into a folder that can be served as it is
load_program                to a task over it
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlserver_hftasks.backends import probe
from mlserver_hftasks.backends.base import Description, Head
from mlserver_hftasks.backends.feeds import marker_of
from mlserver_hftasks.backends.program import Layout, Plan, ProgramBackend, Reads, Runner
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.loading import light
from mlserver_hftasks.loading.cache import kept, key_of, place_of
from mlserver_hftasks.loading.facts import limited
from mlserver_hftasks.loading.manifest import Manifest, Program, candidates, find_program, versions
from mlserver_hftasks.loading.runners import check_head, open_runner
from mlserver_hftasks.loading.served import Served, asked_as, model_facts, probe_rows, task_of
from mlserver_hftasks.loading.stepping import load_stepping
from mlserver_hftasks.settings import Settings
from mlserver_hftasks.tasks.encoder import Encoder
from mlserver_hftasks.tasks.registry import canonical_name, task_class

if TYPE_CHECKING:
    from mlserver_hftasks.loading.source import Source

logger = logging.getLogger("mlserver.hftasks")

TOLERANCE = 1e-4
"""Largest difference, relative to the largest output, that a row's batch may make; `probe` has the two
questions that are asked."""
ROOM = {"bfloat16": 6e-2, "int8": 0.2, "int8-static": 0.2}
"""The same where a runtime may sum in another order in a batch, and a last digit tips a rounding to 8 bits.
What follows is then rounded anew, so that the outputs may move by as much as quantization moved them."""
STILL = 1e-5
"""The same where the neighbours' tokens change and no shape does, in all precisions: sums stay in order."""
OFFSET_FAMILIES = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet", "xlm-roberta-xl", "longformer"})
"""Count positions from padding_idx + 1, so that the table holds two more than a text may have tokens."""


@dataclass(frozen=True, slots=True)
class ProgramReport:
    """What was exported, and how near it is to the model."""

    backend: str
    task: str
    file: str
    layout: str
    quantization: str
    largest_difference: float
    """Of the outputs of the probe rows from the model's, relative to the largest of them."""
    size_bytes: int
    """Of the folder."""
    seconds: float


# -- running one -----------------------------------------------------------------------------------


def load_program(settings: Settings, program: Program) -> Served:
    """A task over a program. Raises `InvalidSettings` for what does not go together."""
    if program.manifest is None:
        return _load_other(settings, program)
    manifest = program.manifest
    _check_compiled(settings, manifest)
    settings = settings.model_copy(update={"task": settings.task or manifest.task})
    kind = _task_for(settings, manifest)
    config = light.read_config(program.folder)
    encoder = Encoder(_tokenizer(settings, program), manifest.max_tokens)
    encoder.max_tokens = limited(settings.max_length, encoder.tokenizer, manifest.max_tokens)
    if manifest.plan.layout is Layout.STEPS:
        generation_config = light.read_generation_config(program.folder)
        return load_stepping(settings, program, kind, config, generation_config, encoder)
    task = kind(model_facts(settings, config, encoder, program.folder))
    return Served(task, _backend(settings, program, kind.head, manifest.plan, encoder, config))


def _check_compiled(settings: Settings, manifest: Manifest) -> None:
    asked = settings.compile is not None and settings.compile.enable
    if asked and manifest.compiled_for is None:
        raise InvalidSettings(
            f'got compile, but the folder holds a program of "{manifest.backend}" that is not compiled, '
            "expected one of `hftasks prepare --backend export --compile`, or no such key "
            "@ parameters.extra.compile"
        )


def _task_for(settings: Settings, manifest: Manifest) -> Any:
    kind, made_for = task_class(canonical_name(settings.task or manifest.task)), task_class(manifest.task)
    if kind.head != made_for.head:
        raise InvalidSettings(
            f"got '{settings.task}', but the program was exported for '{manifest.task}', expected that, or a "
            "task with the same head @ parameters.extra.task"
        )
    return kind


def _tokenizer(settings: Settings, program: Program) -> Any:
    manifest = program.manifest
    if (
        manifest is None
        or manifest.tokenizer is None
        or settings.pretrained_tokenizer
        or settings.do_lower_case
    ):
        return _source(settings, program.folder).tokenizer()
    return light.LightTokenizer(program.folder, manifest.tokenizer)


def _load_other(settings: Settings, program: Program) -> Served:
    """A program of another tool: its model's config and tokenizer say the rest."""
    source = _source(settings, program.folder)
    config, tokenizer = source.config(), source.tokenizer()
    kind = task_of(settings, config, program.folder)
    check_head(kind.head, program.backend)
    encoder = Encoder(tokenizer, limited(settings.max_length, tokenizer, _most_tokens(config, tokenizer)))
    if kind.head.generates:
        generation_config = source.generation_config(config)
        kind.configure(asked_as(settings, config, program.folder), config, generation_config)
        return load_stepping(settings, program, kind, config, generation_config, encoder)
    task = kind(model_facts(settings, config, encoder, program.folder))
    pad = next(
        (i for i in (tokenizer.pad_token_id, config.pad_token_id, tokenizer.eos_token_id) if i is not None), 0
    )
    plan = Plan(Layout.PADDED, int(pad), Reads.ALL, marker=marker_of(config, kind.head))
    return Served(task, _backend(settings, program, kind.head, plan, encoder, config))


def _most_tokens(config: Any, tokenizer: Any) -> int:
    positions = getattr(config, "max_position_embeddings", None) or 1 << 20
    if config.model_type in OFFSET_FAMILIES:
        positions -= 2
    return int(min(positions, tokenizer.model_max_length))


def _backend(
    settings: Settings, program: Program, head: Head, plan: Plan, encoder: Encoder, config: Any
) -> ProgramBackend:
    runner, description = open_runner(settings, program, plan.layout)
    rows = probe.hard_rows(probe_rows(encoder), config, plan.pad_token_id)
    if head.selects:
        rows = [probe.selecting(row) for row in rows]
    _check_ports(runner, head, plan, rows, program)
    backend = ProgramBackend(runner, head, plan, description)
    reason = _objection(backend, rows, description)
    if reason is None or plan.layout is Layout.SINGLE:
        return backend
    logger.warning("%s cannot be batched (%s); its rows run one by one", program.path.name, reason)
    single = replace(description, packing="single")
    return ProgramBackend(runner, head, plan, single, alone=True)


def _objection(backend: ProgramBackend, rows: Sequence[Any], description: Description) -> str | None:
    try:
        alone = [backend.forward([row])[0] for row in rows]
    except Exception as error:  # whatever a runtime makes of a program
        reason = " ".join(str(error).split())
        raise InvalidSettings(
            f"the program fails on a text: {reason:.300}, expected one that runs @ parameters.extra.file_name"
        ) from None
    room = ROOM.get(description.dtype, TOLERANCE)
    return probe.objection_to(backend.forward, rows, alone, room, STILL)


def _check_ports(runner: Runner, head: Head, plan: Plan, rows: Sequence[Any], program: Program) -> None:
    known = ProgramBackend.feed_of(plan, rows[:1])
    if missing := sorted(runner.inputs - set(known)):
        raise InvalidSettings(
            f"'{program.path.name}' takes {', '.join(missing)}, expected inputs of the tokenizer: "
            f"{', '.join(sorted(known))} @ parameters.extra.file_name"
        )
    if missing := sorted(set(head.outputs) - runner.outputs):
        raise InvalidSettings(
            f"'{program.path.name}' gives {', '.join(sorted(runner.outputs))}, expected {', '.join(missing)} "
            "for this task @ parameters.extra.file_name"
        )


# -- making one ------------------------------------------------------------------------------------


def provide_program(settings: Settings) -> Program:
    """The hub's own program, else one exported into the cache. Raises `InvalidSettings`."""
    source = _source(settings)
    if found := _from_hub(settings, source):
        return found
    made_from = settings.model_dump(
        include={
            "task",
            "quantization",
            "compile",
            "pretrained_tokenizer",
            "do_lower_case",
            "trust_remote_code",
            "model_kwargs",
        }
    )
    files = source.weights_folder()
    key = key_of(
        files,
        code=settings.trust_remote_code,
        backend=settings.chosen_backend,
        versions=versions(),
        name=str(files),
        **made_from,
        **_made_for(settings),
    )
    folder = place_of(key, settings.program_cache)

    def make(unfinished: Path) -> None:
        export_program(settings, unfinished, tell=lambda what: logger.info("%s: %s", source.name, what))

    kept(folder, make)
    program = find_program(folder, settings.model_copy(update={"file_name": None}))
    assert program is not None, "a program was exported just now"
    return program


def _made_for(settings: Settings) -> dict[str, object]:
    """What a program hangs on of the machine: its graph on the device, machine code on the CPU."""
    cpu = settings.device in (None, -1, "cpu")
    if settings.compile is None or not settings.compile.enable:
        return {"provider": "cpu" if cpu else "cuda"}
    from mlserver_hftasks.backends.compiled import cpu_features

    return {"provider": "cpu" if cpu else "cuda", "cpu_features": cpu_features()}


def _from_hub(settings: Settings, source: Source) -> Program | None:
    backend = settings.chosen_backend or ""
    for name in candidates(settings):
        if (folder := source.fetch(name)) is not None:
            return Program(backend, folder, folder / name)
    if settings.file_name is not None or backend == "torchscript":
        raise InvalidSettings(
            f"'{settings.file_name or candidates(settings)[0]}' is not there, expected a program beside "
            "the model @ parameters.extra.file_name"
        )
    return None


def export_program(
    settings: Settings,
    out: Path,
    *,
    calibration: Sequence[str] = (),
    tell: Callable[[str], None] = logger.info,
) -> ProgramReport:
    """Export what the settings describe into the folder `out`, which is there and empty.

    The folder is served as it is. `calibration` texts are for `int8-static`. `tell` gets a line at each
    step. Raises `InvalidSettings`; whoever made the folder removes it then (see `cache.new_folder`).
    """
    from mlserver_hftasks.loading.making import make_program

    began = time.monotonic()
    manifest, difference = make_program(settings, out, calibration, tell)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    tell(f"exported in {time.monotonic() - began:.0f} s, {size / 2**20:.0f} MiB")
    return ProgramReport(
        backend=manifest.backend,
        task=manifest.task,
        file=manifest.file,
        layout=manifest.plan.layout.value,
        quantization=manifest.quantization,
        largest_difference=difference,
        size_bytes=size,
        seconds=time.monotonic() - began,
    )


def _source(settings: Settings, folder: Path | None = None) -> Source:
    from mlserver_hftasks.loading.source import Source

    return Source(
        settings if folder is None else settings.model_copy(update={"pretrained_model": str(folder)})
    )
