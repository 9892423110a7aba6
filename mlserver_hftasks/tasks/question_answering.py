"""question-answering: the spans of a context that answer a question.

transformers 5 has no such pipeline; results equal those of version 4.41.2, the newest that
`mlserver_huggingface` runs on (later ones add up the scores of answers with the same text). Differences:
spans with a score of zero are left out, unless there is no other; answers come from the context alone, also
where the tokenizer pads on the left; and what crashed there is answered, or refused with a reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from mlserver_hftasks.backends.base import Head, Level
from mlserver_hftasks.engine.rows import Outputs, Row
from mlserver_hftasks.errors import InvalidRequest, InvalidSettings, RequestTooLarge
from mlserver_hftasks.tasks.base import Answered, Example, ModelFacts, Task
from mlserver_hftasks.tasks.encoder import Encoding
from mlserver_hftasks.tasks.signature import (
    InputSpec,
    OutputSpec,
    Parameters,
    Signature,
    Tensor,
    padded_tensor,
)
from mlserver_hftasks.tasks.spans import (
    Passage,
    Window,
    best_spans,
    cut,
    masked_softmax,
    windows,
    word_bounds,
)

DEFAULT_LENGTH = 384
DEFAULT_OVERLAP = 128
"""Tokens; as in the pipeline of version 4, which took them from SQuAD."""
MOST_ANSWERS = 1000

Answer = dict[str, Any]
"""`score`, `start`, `end` (characters of the context, the end exclusive), `answer`."""


class QuestionAnsweringParameters(Parameters):
    """Parameters of transformers 4's `QuestionAnsweringPipeline`; null stands for the default."""

    top_k: int | None = Field(None, ge=1, le=MOST_ANSWERS, description="how many answers (1)")
    topk: int | None = Field(None, ge=1, le=MOST_ANSWERS, description="old name of top_k")
    doc_stride: int | None = Field(
        None,
        ge=0,
        description="context tokens that neighbouring windows share (half of max_seq_len, at most 128)",
    )
    max_answer_len: int | None = Field(None, ge=1, description="longest answer in tokens (15)")
    max_seq_len: int | None = Field(
        None,
        ge=1,
        description="tokens of a window, with the question and special tokens (384, or the model's limit)",
    )
    max_question_len: int | None = Field(
        None, ge=1, description="accepted, no effect: questions are never cut"
    )
    handle_impossible_answer: bool | None = Field(None, description="let the empty answer compete (false)")
    align_to_words: bool | None = Field(None, description="widen answers to whole words (true)")
    padding: bool | Literal["longest", "max_length", "do_not_pad"] | None = Field(
        None, description="accepted, no effect: windows are not padded"
    )

    @property
    def answers(self) -> int:
        """How many answers are wanted."""
        return self.top_k or self.topk or 1


class QuestionAnswering(Task[QuestionAnsweringParameters]):
    """Extractive question answering; a context longer than the model takes becomes several rows."""

    name = "question-answering"
    head = Head("AutoModelForQuestionAnswering", {"start_logits": Level.TOKEN, "end_logits": Level.TOKEN})
    unwraps_single = True
    signature = Signature(
        inputs=(
            InputSpec(
                "inputs",
                ("args", "array_inputs", "data", "X"),
                required=False,
                description="dicts of question and context, or exactly two texts: a question and its context",
            ),
            InputSpec("question", required=False, description="questions, in place of `inputs`"),
            InputSpec("context", required=False, description="one context per question, or one for all"),
        ),
        parameters=QuestionAnsweringParameters,
        outputs=(
            OutputSpec("answer", "BYTES", (-1, -1), 'the top_k answers, best first, filled up with ""'),
            OutputSpec("score", "FP32", (-1, -1), "their probabilities, filled up with 0"),
            OutputSpec(
                "start", "INT64", (-1, -1), "their first characters in the context, filled up with -1"
            ),
            OutputSpec("end", "INT64", (-1, -1), "the characters after their last, filled up with -1"),
        ),
    )

    def __init__(self, model: ModelFacts) -> None:
        super().__init__(model)
        tokenizer = model.encoder.tokenizer
        if not model.encoder.is_fast:
            raise InvalidSettings(
                f"{type(tokenizer).__name__} does not say which characters a token covers, expected one "
                "with a tokenizer.json @ parameters.extra.pretrained_tokenizer"
            )
        self._question_first = tokenizer.padding_side == "right"
        self._cls_token_id = tokenizer.cls_token_id

    def examples(
        self, inputs: Mapping[str, Sequence[Any]], parameters: QuestionAnsweringParameters
    ) -> list[Example]:
        """One row per window of the context."""
        pairs = self._pairs(inputs)
        length = self._window_length(parameters)
        ordered = pairs if self._question_first else [(context, question) for question, context in pairs]
        encodings = self.model.encoder.encode(ordered, limited=False)
        name = "inputs" if "inputs" in inputs else "question"
        return [
            self._example(encoding, context, length, parameters.doc_stride, f"{name}[{index}]")
            for index, (encoding, (_, context)) in enumerate(zip(encodings, pairs, strict=True))
        ]

    def postprocess(self, answered: Answered, parameters: QuestionAnsweringParameters) -> Any:
        """One dict, or a list of dicts where `top_k` finds more than one answer."""
        answers = self._answers(answered, parameters)
        return answers[0] if len(answers) == 1 else answers

    def tensors(
        self, names: Sequence[str], answered: Sequence[Answered], parameters: QuestionAnsweringParameters
    ) -> Mapping[str, Tensor]:
        """All [n, top_k]."""
        answers = [self._answers(item, parameters) for item in answered]
        fills = {"answer": "", "score": 0.0, "start": -1, "end": -1}
        return {
            name: padded_tensor(
                self.signature.output_named(name).datatype,
                [[answer[name] for answer in row] for row in answers],
                fills[name],
                parameters.answers,
            )
            for name in names
        }

    # -- requests --------------------------------------------------------------------------------

    def _pairs(self, inputs: Mapping[str, Sequence[Any]]) -> list[tuple[str, str]]:
        """Questions with their contexts."""
        if "inputs" in inputs:
            if "question" in inputs or "context" in inputs:
                raise InvalidRequest("got both inputs and question or context, expected one of them @ inputs")
            return self._pairs_of_items(inputs["inputs"])
        for name in ("question", "context"):
            if name not in inputs:
                raise InvalidRequest(f"no {name}, expected question and context, or inputs @ {name}")
            self.check_count(len(inputs[name]), name)
        questions, contexts = (
            [self._nonempty(value, f"{name}[{index}]") for index, value in enumerate(inputs[name])]
            for name in ("question", "context")
        )
        if len(contexts) not in (1, len(questions)):
            got = f"{len(contexts)} contexts for {len(questions)} questions"
            raise InvalidRequest(f"got {got}, expected one for all or one for each @ context")
        return list(zip(questions, contexts if len(contexts) > 1 else contexts * len(questions), strict=True))

    def _pairs_of_items(self, items: Sequence[Any]) -> list[tuple[str, str]]:
        self.check_count(len(items), "inputs")
        if len(items) == 2 and all(isinstance(item, str) for item in items):
            items = [{"question": items[0], "context": items[1]}]
        pairs = []
        for index, item in enumerate(items):
            where = f"inputs[{index}]"
            if not isinstance(item, dict) or set(item) != {"question", "context"}:
                keys = f"the keys {sorted(map(str, item))}" if isinstance(item, dict) else f"{item!r:.60}"
                raise InvalidRequest(f"got {keys}, expected a dict of question and context @ {where}")
            question = self._nonempty(item["question"], f"{where}.question")
            pairs.append((question, self._nonempty(item["context"], f"{where}.context")))
        return pairs

    def _nonempty(self, value: Any, where: str) -> str:
        text = self.text(value, where)
        if not text:
            raise InvalidRequest(f"got an empty text, expected at least one character @ {where}")
        return text

    # -- windows ---------------------------------------------------------------------------------

    def _window_length(self, parameters: QuestionAnsweringParameters) -> int:
        """Tokens of a window."""
        limit, overlap = self.model.encoder.max_tokens, parameters.doc_stride
        length = parameters.max_seq_len or min(limit, DEFAULT_LENGTH)
        if length > limit:
            raise InvalidRequest(f"got {length}, expected 1..{limit} @ max_seq_len")
        if overlap is not None and overlap >= length:
            raise InvalidRequest(f"got {overlap}, expected less than max_seq_len, {length} @ doc_stride")
        return length

    def _example(
        self, encoding: Encoding, context: str, length: int, overlap: int | None, where: str
    ) -> Example:
        """The windows of one question and context. All that is not context is in each of them."""
        begin, end = self._context_range(encoding)
        row = self.model.encoder.row(encoding)
        pieces = [(0, end - begin)]
        if row.cost > length:
            pieces = self._pieces(end - begin, length, row.cost - (end - begin), overlap, where)
        word_first, word_last = word_bounds(encoding.word_ids[begin:end])
        passage = Passage(
            context,
            tuple(Window(start, stop, begin) for start, stop in pieces),
            np.array(encoding.offsets[begin:end], dtype=np.int64).reshape(-1, 2),
            word_first,
            word_last,
        )
        if len(pieces) == 1:
            return Example((row,), passage)
        return Example(tuple(cut(row, begin, end, *piece) for piece in pieces), passage)

    def _context_range(self, encoding: Encoding) -> tuple[int, int]:
        """Positions of the context's first token and after its last; both 0 where it has none."""
        context = 1 if self._question_first else 0
        ids = encoding.sequence_ids
        if context not in ids:
            return 0, 0
        begin = ids.index(context)
        return begin, begin + ids.count(context)

    def _pieces(
        self, tokens: int, length: int, taken: int, overlap: int | None, where: str
    ) -> list[tuple[int, int]]:
        """Windows of `length` over a context of `tokens`; all else is `taken` from each of them."""
        room = length - taken
        if room < 1:
            raise InvalidRequest(
                f"a question that takes {taken} of {length} tokens, expected one that leaves room for the "
                f"context, or a larger max_seq_len @ {where}"
            )
        if overlap is None:
            overlap = min(length // 2, DEFAULT_OVERLAP)
            if overlap >= room:  # where version 4 died
                overlap = room // 2
        if overlap >= room:
            raise InvalidRequest(
                f"got {overlap}, expected less than the {room} tokens that {where} leaves for the context "
                "@ doc_stride"
            )
        most = self.model.limits.max_items
        if (tokens - room) // (room - overlap) >= most:
            raise RequestTooLarge(f"more than {most} windows over one context, expected fewer @ doc_stride")
        return windows(tokens, room, overlap)

    # -- answers ---------------------------------------------------------------------------------

    def _answers(self, answered: Answered, parameters: QuestionAnsweringParameters) -> list[Answer]:
        """The best answers over all windows, best first, at least one."""
        passage: Passage = answered.example.context
        found: list[Answer] = []
        no_answer = 1.0
        for row, window, outputs in zip(
            answered.example.rows, passage.windows, answered.outputs, strict=True
        ):
            start, end, cls = self._probabilities(row, window, outputs)
            no_answer = min(no_answer, cls)
            best = best_spans(start, end, parameters.max_answer_len or 15, parameters.answers)
            found.extend(passage.answers(window, *best, align=parameters.align_to_words is not False))
        if parameters.handle_impossible_answer or not found:
            score = no_answer if parameters.handle_impossible_answer else 0.0
            found.append({"score": score, "start": 0, "end": 0, "answer": ""})
        return sorted(found, key=lambda answer: -answer["score"])[: parameters.answers]

    def best_span(self, answered: Answered, parameters: QuestionAnsweringParameters) -> tuple[Row, int, int]:
        """The window with the best answer, as its row, and the answer's first and last token there.

        The CLS token, or the first, where there is no answer, or none is likelier and may be given.
        """
        passage: Passage = answered.example.context
        best, no_answer = (0.0, answered.example.rows[0], 0, 0), 1.0
        for row, window, outputs in zip(
            answered.example.rows, passage.windows, answered.outputs, strict=True
        ):
            start, end, cls = self._probabilities(row, window, outputs)
            no_answer = min(no_answer, cls)
            first, last, score = best_spans(start, end, parameters.max_answer_len or 15, 1)
            if len(score) and score[0] > best[0]:
                best = float(score[0]), row, window.offset + int(first[0]), window.offset + int(last[0])
        of_best, row, begins, ends = best
        if of_best > 0 and not (parameters.handle_impossible_answer and no_answer > of_best):
            return row, begins, ends
        place = int((row.arrays["input_ids"] == self._cls_token_id).argmax())
        return row, place, place

    def _probabilities(self, row: Row, window: Window, outputs: Outputs) -> tuple[Any, Any, float]:
        """Of starting and of ending at each context token of the window, and of there being no answer.

        The models say the last at the CLS token, which therefore takes part in the softmax; where the
        tokenizer pads on the left, version 4 lets all tokens take part.
        """
        is_cls = row.arrays["input_ids"] == self._cls_token_id
        context = window.in_row
        if self._question_first:
            mask = is_cls.copy()
            mask[context] = True
        else:
            mask = np.ones(row.cost, dtype=np.bool_)
        start = masked_softmax(outputs["start_logits"], mask)
        end = masked_softmax(outputs["end_logits"], mask)
        cls = int(is_cls.argmax())
        no_answer = float(start[cls] * end[cls]) if is_cls[cls] else 0.0
        return start[context], end[context], no_answer
