"""summarization: a text, shorter."""

from __future__ import annotations

from mlserver_hftasks.tasks.seq2seq import Seq2Seq, Seq2SeqParameters, signature_of


class Summarization(Seq2Seq[Seq2SeqParameters]):
    """Results equal those of transformers 4's `SummarizationPipeline`."""

    name = "summarization"
    result = "summary"
    signature = signature_of(result, Seq2SeqParameters)
