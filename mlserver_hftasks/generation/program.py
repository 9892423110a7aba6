"""A decoder that was exported, run by ONNX Runtime: one step for many sequences, no padding, no copies.

`ports` says what the program takes. The cache is this module's (`slabs`): the program is handed addresses in
it, for reading and for writing, so nothing of it is copied from step to step. A step in which nobody joined
or left uses the addresses of the step before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlserver_hftasks.backends.base import Description
from mlserver_hftasks.engine.rows import FloatArray
from mlserver_hftasks.engine.sequences import Choice, Chunk
from mlserver_hftasks.generation import ports
from mlserver_hftasks.generation.host_sampling import choose
from mlserver_hftasks.generation.slabs import CacheShape, Pass, Slab, SlabCache


@dataclass(frozen=True, slots=True)
class Rows:
    """The shape of a pass: rows of the slab, and how many tokens and answers."""

    first: int
    """Row of the first sequence that decodes; the others follow."""
    decoding: int
    piece_row: int
    piece: int
    """Tokens of the piece."""
    reads: int

    @classmethod
    def of(cls, run: Pass, chunks: Sequence[Chunk], reads: int) -> Rows:
        """Of a pass. The program always runs both parts: a token of nobody's where one has nothing to do."""
        slab = run.slab
        first, decoding = (0, len(run.decoding)) if run.decoding else (slab.spare, 1)
        if run.piece is None:
            return cls(first, decoding, slab.spare, 1, reads)
        chunk = chunks[run.piece]
        return cls(first, decoding, slab.row_of(chunk.sequence), chunk.count, reads)


class Bound:
    """A session bound to rows of a slab, with arrays for what changes from step to step."""

    def __init__(self, session: Any, slab: Slab, rows: Rows, vocabulary: int) -> None:
        self.slab, self.rows = slab, rows
        self._session, self._binding = session, session.io_binding()
        self.inputs: dict[str, npt.NDArray[Any]] = {
            ports.DECODE_IDS: np.zeros(rows.decoding, np.int64),
            ports.DECODE_LAST: np.zeros(rows.decoding, np.int32),
            ports.PIECE_IDS: np.zeros(rows.piece, np.int64),
            ports.PIECE_LAST: np.zeros(1, np.int32),
            ports.READS: np.zeros(rows.reads, np.int64),
        }
        self.logits: FloatArray = np.empty((rows.reads, vocabulary), np.float32)
        for name, array in self.inputs.items():
            self._bind(self._binding.bind_input, name, array)
        self._bind(self._binding.bind_output, ports.LOGITS, self.logits)
        self._bind_caches(ports.DECODING, slice(rows.first, rows.first + rows.decoding))
        self._bind_caches(ports.PIECE, slice(rows.piece_row, rows.piece_row + 1))

    def run(self) -> FloatArray:
        """Logits [reads, vocabulary] for what the inputs hold now; overwritten by the next run."""
        self._session.run_with_iobinding(self._binding)
        return self.logits

    def _bind_caches(self, whose: str, rows: slice) -> None:
        for layer, memory in enumerate(self.slab.memory):
            for name, part in zip(ports.cache_names(whose, layer), memory, strict=True):
                self._bind(self._binding.bind_input, name, part[rows])
                self._bind(self._binding.bind_output, ports.extended(name), part[rows])

    @staticmethod
    def _bind(bind: Any, name: str, array: npt.NDArray[Any]) -> None:
        bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


class ProgramDecoder:
    """Steps through a program of ours; see `engine.sequences.Stepper`."""

    def __init__(self, session: Any, *, cache_tokens: int, description: Description) -> None:
        self._session = session
        self._vocabulary = int(session.get_outputs()[0].shape[1])
        self._cache = SlabCache(cache_shape_of(session), cache_tokens)
        self._last: Bound | None = None
        self.cache_tokens, self.description = cache_tokens, description

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return self._vocabulary

    def step(self, chunks: Sequence[Chunk]) -> Sequence[Choice | None]:
        """See `engine.sequences.Stepper`."""
        results: list[Choice | None] = [None] * len(chunks)
        # All passes before the first draw: a step that raises is run again, and a seed draws once per token.
        for indices, logits in self._passes(chunks):
            chosen = choose(logits, [chunks[index].sequence for index in indices])
            for index, choice in zip(indices, chosen, strict=True):
                results[index] = choice
        return results

    def logits(self, chunks: Sequence[Chunk]) -> FloatArray:
        """Logits after each of the chunks that choose, [n, vocabulary]."""
        found: dict[int, FloatArray] = {}
        for indices, logits in self._passes(chunks):
            found.update(zip(indices, logits, strict=True))
        rows = [found[index] for index in sorted(found)]
        return np.stack(rows) if rows else np.empty((0, self._vocabulary), np.float32)

    def beside(self, cache_tokens: int) -> ProgramDecoder:
        """Another over the same program, with a cache of its own."""
        return ProgramDecoder(self._session, cache_tokens=cache_tokens, description=self.description)

    def close(self) -> None:
        """Give the memory back; `step` must not be called again."""
        self._last = None
        self._cache.clear()
        del self._session

    def _passes(self, chunks: Sequence[Chunk]) -> list[tuple[list[int], FloatArray]]:
        """Of each pass what `_pass` says. No two passes of a step have the same rows, so that none writes
        over another's logits."""
        return [self._pass(run, chunks) for run in self._cache.passes(chunks)]

    def _pass(self, run: Pass, chunks: Sequence[Chunk]) -> tuple[list[int], FloatArray]:
        """Indices of the chunks that choose, and their logits."""
        order = [*run.decoding, *([] if run.piece is None else [run.piece])]
        choosing = [index for index in order if chunks[index].chooses]
        bound = self._bound(run, chunks, max(len(choosing), 1))
        decoding = [chunks[index] for index in run.decoding]
        if decoding:
            bound.inputs[ports.DECODE_IDS][:] = [chunk.tokens[0] for chunk in decoding]
            bound.inputs[ports.DECODE_LAST][:] = [chunk.position for chunk in decoding]
        if run.piece is not None:
            piece = chunks[run.piece]
            bound.inputs[ports.PIECE_IDS][:] = piece.tokens
            bound.inputs[ports.PIECE_LAST][:] = piece.position + piece.count - 1
        if choosing:
            bound.inputs[ports.READS][:] = _reads(run, chunks, bound.rows)
        return choosing, bound.run()[: len(choosing)]

    def _bound(self, run: Pass, chunks: Sequence[Chunk], reads: int) -> Bound:
        rows = Rows.of(run, chunks, reads)
        last = self._last
        if last is None or last.slab is not run.slab or last.rows != rows:
            last = Bound(self._session, run.slab, rows, self._vocabulary)
        self._last = last
        return last


def _reads(run: Pass, chunks: Sequence[Chunk], rows: Rows) -> list[int]:
    """Which tokens of the pass are chosen after."""
    reads = [place for place, index in enumerate(run.decoding) if chunks[index].chooses]
    if run.piece is not None and chunks[run.piece].chooses:
        reads.append(rows.decoding + rows.piece - 1)
    return reads


def cache_shape_of(session: Any) -> CacheShape:
    """Of the cache that the program extends. Raises ValueError, with the reason, for another program."""
    shapes = {each.name: each.shape for each in session.get_inputs()}
    if missing := sorted({*ports.TOKENS, *ports.cache_names(ports.DECODING, 0)} - set(shapes)):
        raise ValueError(f"has no {missing[0]}")
    layers = 0
    while ports.cache_names(ports.DECODING, layers)[0] in shapes:
        layers += 1
    _, heads, _, width = shapes[ports.cache_names(ports.DECODING, 0)[0]]
    return CacheShape(layers, int(heads), int(width))
