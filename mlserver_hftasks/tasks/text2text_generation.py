"""text2text-generation: whatever a model with an encoder and a decoder makes of a text."""

from __future__ import annotations

from mlserver_hftasks.tasks.seq2seq import Seq2Seq, Seq2SeqParameters, signature_of


class Text2TextGeneration(Seq2Seq[Seq2SeqParameters]):
    """Results equal those of transformers 4's `Text2TextGenerationPipeline`."""

    name = "text2text-generation"
    result = "generated"
    signature = signature_of(result, Seq2SeqParameters)
