"""Serves a decoder from a program: without torch and transformers, where the program is one of ours."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from mlserver_hftasks.backends.base import Description
from mlserver_hftasks.backends.onnx import CPU, open_session
from mlserver_hftasks.backends.probe import window_of
from mlserver_hftasks.engine.rows import FloatArray, IntArray
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.generation import ports, probe
from mlserver_hftasks.generation.program import ProgramDecoder, cache_shape_of
from mlserver_hftasks.generation.whole import NoWholeAnswers
from mlserver_hftasks.loading import cache_room
from mlserver_hftasks.loading.manifest import Program
from mlserver_hftasks.loading.runners import check_stepping
from mlserver_hftasks.loading.served import Served, model_facts
from mlserver_hftasks.settings import Settings
from mlserver_hftasks.tasks.base import Task
from mlserver_hftasks.tasks.encoder import Encoder

logger = logging.getLogger("mlserver.hftasks")

TOLERANCE = 1e-4
ROOM = {"int8": 6e-2}
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
    check_ports(session, program)
    cache_tokens = settings.kv_cache_tokens or cache_room.usual_tokens(
        cache_room.SHARE_OF_MEMORY * cache_room.free_ram(), cache_shape_of(session).bytes, encoder.max_tokens
    )
    decoder = ProgramDecoder(
        session, cache_tokens=cache_tokens, description=Description("onnx", "cpu", dtype, "continuous")
    )
    _check_answers(decoder, config, dtype, program)
    facts = model_facts(
        settings,
        config,
        encoder,
        program.folder,
        generation_config=generation_config,
        cache_tokens=cache_tokens,
        whole=False,
    )
    return Served(kind(facts), NoWholeAnswers(decoder.description), decoder)


def check_ports(session: Any, program: Program) -> None:
    """Raises `InvalidSettings` for a program that is no decoder of ours."""
    there = {each.name for each in (*session.get_inputs(), *session.get_outputs())}
    if missing := sorted({*ports.TOKENS, *ports.cache_names(ports.DECODING, 0), ports.LOGITS} - there):
        raise InvalidSettings(
            f"'{program.path.name}' has no {missing[0]}, expected a decoder that `hftasks prepare` wrote "
            "@ parameters.extra.pretrained_model"
        )


def _check_answers(decoder: ProgramDecoder, config: Any, dtype: str, program: Program) -> None:
    """Each sequence gets what it gets alone, and its neighbours do not matter; else `InvalidSettings`."""
    try:
        texts = probe.texts_for(decoder.vocabulary, window_of(config), decoder.cache_tokens)
        alone = alone_in(decoder, texts)
        reason = probe.objection(decoder.logits, texts, alone, ROOM.get(dtype, TOLERANCE))
    except Exception as error:  # whatever a runtime makes of a program
        reason = f"it fails: {' '.join(str(error).split()):.300}"
    if reason is not None:
        raise InvalidSettings(
            f"'{program.path.name}' does not answer alike in every company ({reason}), expected a program "
            'that does, or the backend "torch" @ parameters.extra.backend'
        )


def alone_in(decoder: ProgramDecoder, texts: Sequence[IntArray]) -> list[FloatArray]:
    """What the decoder says of each text by itself, its prompt in one piece; see `probe.objection`."""
    return [probe.logits_in_steps(decoder.logits, [text], piece=len(text))[0] for text in texts]
