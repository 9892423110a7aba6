"""Serves a decoder from a program: without torch and transformers, where the program is one of ours."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from mlserver_hftasks.backends.base import Backend, Description
from mlserver_hftasks.backends.onnx import CPU, check_options, open_session
from mlserver_hftasks.backends.probe import window_of
from mlserver_hftasks.engine.rows import FloatArray, IntArray
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.generation import past, probe
from mlserver_hftasks.generation.past import PastDecoder
from mlserver_hftasks.generation.program import ProgramDecoder, cache_shape_of
from mlserver_hftasks.generation.slabs import CacheShape
from mlserver_hftasks.generation.whole import NoWholeAnswers
from mlserver_hftasks.loading import cache_room
from mlserver_hftasks.loading.manifest import Program
from mlserver_hftasks.loading.runners import check_stepping
from mlserver_hftasks.loading.served import Scoring, Served, model_facts
from mlserver_hftasks.settings import Settings
from mlserver_hftasks.tasks.base import Task
from mlserver_hftasks.tasks.encoder import Encoder

logger = logging.getLogger("mlserver.hftasks")

SCORED_TEXTS = 2
"""As many of the longest texts fit at once into the cache of what explains."""
TOLERANCE = 1e-4
ROOM = {"int8": 6e-2, "int8-weight-only": 6e-2, "int4-weight-only": 6e-2}
"""Largest difference from what a sequence gets alone, relative to the largest logit, where a last digit may
fall to the other side; `TOLERANCE` else."""


def load_stepping(
    settings: Settings,
    program: Program,
    kind: type[Task[Any]],
    config: Any,
    generation_config: Any,
    encoder: Encoder,
) -> Served:
    """The task over a decoder. Raises `InvalidSettings` for what does not go together."""
    dtype = check_stepping(settings, program)
    session = open_session(program.path, settings.intra_op_threads, CPU, settings.provider_options)
    check_options(CPU, settings.provider_options)
    shape = _cache_shape(session, program)
    cache_tokens = settings.kv_cache_tokens or cache_room.usual_tokens(
        cache_room.SHARE_OF_MEMORY * cache_room.free_ram(), shape.bytes, encoder.max_tokens
    )
    decoder = _decoder(session, program, config, cache_tokens, dtype)
    facts = model_facts(
        settings,
        config,
        encoder,
        program.folder,
        generation_config=generation_config,
        cache_tokens=cache_tokens,
        whole=False,
    )
    return Served(
        kind(facts), NoWholeAnswers(decoder.description), decoder, _scoring(decoder, encoder.max_tokens)
    )


def _scoring(decoder: ProgramDecoder | PastDecoder, max_tokens: int) -> Scoring:
    """The same program with a cache of its own."""

    def make(pause: Callable[[], object]) -> Backend:
        from mlserver_hftasks.generation.stepped_scoring import SteppedScoring

        return SteppedScoring(decoder.beside(SCORED_TEXTS * max_tokens), pause)

    return Scoring(make, gradients=False)


def _decoder(
    session: Any, program: Program, config: Any, cache_tokens: int, dtype: str
) -> ProgramDecoder | PastDecoder:
    """What runs the program, after it was tried. Raises `InvalidSettings`."""
    texts = probe.texts_for(int(config.vocab_size), window_of(config), cache_tokens)
    try:
        if program.manifest is not None:
            how = Description("onnx", "cpu", dtype, "continuous")
            decoder = ProgramDecoder(session, cache_tokens=cache_tokens, description=how)
            reason = _objection(decoder, texts, dtype)
        else:
            return _past_decoder(session, program, texts, cache_tokens, dtype)
    except Exception as error:  # whatever a runtime makes of a program
        reason = f"it fails on a text: {' '.join(str(error).split()):.300}"
    if reason is None:
        return decoder
    raise InvalidSettings(
        f"'{program.path.name}' does not answer alike in every company ({reason}), expected a program that "
        'does, or the backend "torch" @ parameters.extra.backend'
    )


def _past_decoder(
    session: Any, program: Program, texts: Sequence[IntArray], cache_tokens: int, dtype: str
) -> PastDecoder:
    """Batched, if sequences get their own answers so; else one by one. Raises what the program raises."""
    made = functools.partial(PastDecoder, session, cache_tokens=cache_tokens)
    batched = made(description=Description("onnx", "cpu", dtype, "padded"))
    single = made(description=Description("onnx", "cpu", dtype, "single"), batched=False)
    alone_in(single, texts[:1])
    try:
        reason = _objection(batched, texts, dtype)
    except Exception as error:  # it may have been exported for a batch of one
        reason = " ".join(str(error).split())
    if reason is None:
        return batched
    logger.warning("%s cannot be batched (%.200s): its sequences take turns", program.path.name, reason)
    return single


def _cache_shape(session: Any, program: Program) -> CacheShape:
    """Raises `InvalidSettings` for a program that is no decoder."""
    try:
        if program.manifest is None:
            return past.cache_shape_of(session)
        return cache_shape_of(session)
    except (KeyError, ValueError) as error:
        raise InvalidSettings(
            f"'{program.path.name}' {error}, expected a decoder that was exported with its cache "
            '(text-generation-with-past), or the backend "torch" @ parameters.extra.file_name'
        ) from None


def _objection(decoder: ProgramDecoder | PastDecoder, texts: Sequence[IntArray], dtype: str) -> str | None:
    """Whether each sequence gets what it gets alone, and its neighbours do not matter."""
    alone = alone_in(decoder, texts)
    return probe.objection(decoder.logits, texts, alone, ROOM.get(dtype, TOLERANCE))


def alone_in(decoder: ProgramDecoder | PastDecoder, texts: Sequence[IntArray]) -> list[FloatArray]:
    """What the decoder says of each text by itself, its prompt in one piece; see `probe.objection`."""
    return [probe.logits_in_steps(decoder.logits, [text], piece=len(text))[0] for text in texts]
