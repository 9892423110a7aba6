"""Exports a decoder into a folder that is served as it is: imported only where one is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from mlserver_hftasks.backends.base import Description
from mlserver_hftasks.backends.onnx import open_session
from mlserver_hftasks.backends.program import Layout, Plan
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.export.decoder import write_decoder
from mlserver_hftasks.export.job import Order
from mlserver_hftasks.generation import probe
from mlserver_hftasks.generation.plain import new_token_logits, probe_texts
from mlserver_hftasks.generation.program import ProgramDecoder
from mlserver_hftasks.loading import light
from mlserver_hftasks.loading.facts import pad_token_id_of
from mlserver_hftasks.loading.manifest import Manifest, versions
from mlserver_hftasks.loading.served import asked_as
from mlserver_hftasks.loading.source import Source
from mlserver_hftasks.loading.stepping import alone_in
from mlserver_hftasks.settings import Settings
from mlserver_hftasks.tasks.base import Task
from mlserver_hftasks.tasks.encoder import Encoder
from mlserver_hftasks.tasks.registry import canonical_name

PROBE_CACHE_TOKENS = 8192
MOST = {"none": 1e-3, "int8": 0.5, "int8-weight-only": 0.5, "int4-weight-only": 1.0}
"""Largest relative difference of a program's logits from its model's."""


def make_decoder(
    settings: Settings,
    order: Order,
    out: Path,
    source: Source,
    kind: type[Task[Any]],
    model: PreTrainedModel,
    encoder: Encoder,
    tell: Callable[[str], None],
) -> tuple[Manifest, float]:
    """The manifest of the program, and its largest relative difference from the model.

    Raises `InvalidSettings`. Changes the model.
    """
    config, tokenizer = model.config, encoder.tokenizer
    generation_config = getattr(model, "generation_config", None) or GenerationConfig()
    kind.configure(asked_as(settings, config, source.folder), config, generation_config)
    texts = probe_texts(model, PROBE_CACHE_TOKENS)
    expected = [new_token_logits(model, text) for text in texts]
    file = write_decoder(model, out, order.quantization, tell)
    for saved in (tokenizer, config, generation_config):
        saved.save_pretrained(out)
    manifest = Manifest(
        backend=order.format,
        file=file,
        task=canonical_name(settings.task or kind.name),
        plan=Plan(Layout.STEPS, pad_token_id_of(tokenizer, model)),
        max_tokens=encoder.max_tokens,
        quantization=order.quantization,
        tokenizer=light.facts_of(tokenizer, out),
        made_with=versions(),
    )
    tell("comparing it with the model")
    decoder = ProgramDecoder(
        open_session(out / file, settings.intra_op_threads),
        cache_tokens=PROBE_CACHE_TOKENS,
        description=Description("onnx", "cpu", "", "continuous"),
    )
    got = alone_in(decoder, texts)
    decoder.close()
    worst = max(probe.difference(*pair) for pair in zip(got, expected, strict=True))
    if not worst <= MOST[order.quantization]:  # NaN is too much as well
        raise InvalidSettings(
            f"the program's logits differ from the model's by {worst:.1e} of the largest, expected at most "
            f"{MOST[order.quantization]:g}: choose another backend or quantization @ parameters.extra.backend"
        )
    manifest.write(out)
    return manifest, worst
