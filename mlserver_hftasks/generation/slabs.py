"""The cache of a program that steps: each sequence's keys and values are a row of a *slab*.

A program attends from n sequences to n rows that lie one after another, `[n, heads, capacity, width]`, so a
slab keeps the sequences that decode in its first rows. Who joins takes a free row, who leaves is replaced by
the last; a step moves nothing otherwise. Memory is taken when it is written, so that a row costs what its
sequence is long, not what the slab's longest may become.

There is one slab while its area, rows times capacity, is no more than `STRETCH` times the cache that the
engine reckons with. Beyond (one very long sequence among many short ones) who joins gets another slab, and a
step passes through the model once per slab. Slabs after the first may take once the cache more, so that one
that has grown to its bound leaves room for those who do not fit into it to share another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlserver_hftasks.engine.rows import FloatArray
from mlserver_hftasks.engine.sequences import Chunk, GeneratedSequence

STRETCH = 2
FEWEST_ROWS, LEAST_CAPACITY = 4, 64


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Of the keys, and of the values, of one token."""

    layers: int
    heads: int
    width: int

    @property
    def bytes(self) -> int:
        """Of one token's keys and values in float32."""
        return 2 * self.layers * self.heads * self.width * 4


class Slab:
    """Rows of keys and values, [layers, 2, rows, heads, capacity, width]. The last row is nobody's.

    What the program computes only because it must compute something (see `program`) goes there.
    """

    def __init__(self, shape: CacheShape, rows: int, capacity: int) -> None:
        self.shape = shape
        self.memory: FloatArray = np.empty(
            (shape.layers, 2, rows + 1, shape.heads, capacity, shape.width), dtype=np.float32
        )
        self.occupants: list[GeneratedSequence | None] = [None] * rows
        self._filled = [0] * rows
        """Tokens of each row that were written, which may be more than the engine knows of yet."""

    @property
    def rows(self) -> int:
        """Rows for sequences."""
        return len(self.occupants)

    @property
    def capacity(self) -> int:
        """Tokens of a row."""
        return int(self.memory.shape[4])

    @property
    def spare(self) -> int:
        """The row that is nobody's."""
        return self.rows

    @property
    def sequences(self) -> list[GeneratedSequence]:
        """Those that have a row."""
        return [each for each in self.occupants if each is not None]

    def row_of(self, sequence: GeneratedSequence) -> int:
        """The row of a sequence. Raises ValueError if it has none."""
        return self.occupants.index(sequence)

    def join(self, sequence: GeneratedSequence) -> None:
        """Give a free row to the sequence."""
        row = self.occupants.index(None)
        self.occupants[row], self._filled[row] = sequence, 0

    def fills(self, chunk: Chunk) -> None:
        """The chunk is about to be written."""
        self._filled[self.row_of(chunk.sequence)] = chunk.position + chunk.count

    def release_done(self) -> None:
        """Free the rows of sequences that have left the engine."""
        self.occupants = [None if each is None or each.extent < 0 else each for each in self.occupants]

    def bring_forward(self, sequences: Sequence[GeneratedSequence]) -> list[GeneratedSequence]:
        """Let these sequences have the first rows; returns them in their order there."""
        count, wanted = len(sequences), set(map(id, sequences))
        behind = [row for row in range(count, self.rows) if id(self.occupants[row]) in wanted]
        for row in range(count):
            if id(self.occupants[row]) not in wanted:
                self._swap(row, behind.pop())
        return [each for each in self.occupants[:count] if each is not None]

    def resized(self, rows: int, capacity: int) -> Slab:
        """A slab of that size with the same sequences, which must fit, in its first rows."""
        made = Slab(self.shape, rows, capacity)
        for new, sequence in enumerate(self.sequences):
            row = self.row_of(sequence)
            used = self._filled[row]
            made.memory[:, :, new, :, :used] = self.memory[:, :, row, :, :used]
            made.occupants[new], made._filled[new] = sequence, used
        return made

    def _swap(self, one: int, other: int) -> None:
        kept = None
        if self.occupants[one] is not None:
            kept = self.memory[:, :, one, :, : self._filled[one]].copy()
        used = self._filled[other]
        self.memory[:, :, one, :, :used] = self.memory[:, :, other, :, :used]
        if kept is not None:
            self.memory[:, :, other, :, : kept.shape[3]] = kept
        people, filled = self.occupants, self._filled
        people[one], people[other] = people[other], people[one]
        filled[one], filled[other] = filled[other], filled[one]


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass through the model: the sequences of `decoding` are in the first rows of the slab."""

    slab: Slab
    decoding: tuple[int, ...]
    """Indices of the step's chunks, in the order of the rows."""
    piece: int | None
    """Index of the chunk with a piece of a prompt."""


class SlabCache:
    """Places the sequences of steps; no more than about `tokens` of them are meant to be there at once."""

    def __init__(self, shape: CacheShape, tokens: int) -> None:
        self.shape, self.tokens = shape, tokens
        self.slabs: list[Slab] = []

    def passes(self, chunks: Sequence[Chunk]) -> Iterator[Pass]:
        """How a step goes through the model: each to be run before the next is asked for."""
        self._release()
        for chunk in chunks:
            if self._slab_of(chunk.sequence) is None:
                self._join(chunk.sequence)
        for slab in list(self.slabs):
            yield from self._passes(slab, chunks)

    def clear(self) -> None:
        """Give the memory back."""
        self.slabs.clear()

    @property
    def area(self) -> int:
        """Tokens that the slabs could hold."""
        return sum(slab.rows * slab.capacity for slab in self.slabs)

    def _passes(self, slab: Slab, chunks: Sequence[Chunk]) -> Iterator[Pass]:
        here = {id(sequence) for sequence in slab.sequences}
        mine = [index for index, chunk in enumerate(chunks) if id(chunk.sequence) in here]
        decoding = {id(chunks[index].sequence): index for index in mine if chunks[index].count == 1}
        pieces = [index for index in mine if chunks[index].count > 1]
        ordered = slab.bring_forward([chunks[index].sequence for index in decoding.values()])
        indices = tuple(decoding[id(sequence)] for sequence in ordered)
        for index in mine:
            slab.fills(chunks[index])
        if indices or pieces:
            yield Pass(slab, indices, pieces[0] if pieces else None)
        for piece in pieces[1:]:
            yield Pass(slab, (), piece)

    def _release(self) -> None:
        for slab in self.slabs:
            slab.release_done()
        self.slabs = [slab for slab in self.slabs if slab.sequences]

    def _slab_of(self, sequence: GeneratedSequence) -> Slab | None:
        return next((slab for slab in self.slabs if sequence in slab.occupants), None)

    def _join(self, sequence: GeneratedSequence) -> None:
        need = sequence.prompt.reserved
        for index, slab in enumerate(self.slabs):
            rows = slab.rows if None in slab.occupants else 2 * slab.rows
            capacity = max(slab.capacity, _rounded(need))
            grown = rows * capacity - slab.rows * slab.capacity
            if grown and self.area + grown > self._most(index):
                continue
            if grown:
                self.slabs[index] = slab.resized(rows, capacity)
            return self.slabs[index].join(sequence)
        fits = self.area + FEWEST_ROWS * _rounded(need) <= self._most(len(self.slabs))
        self.slabs.append(Slab(self.shape, *((FEWEST_ROWS, _rounded(need)) if fits else (1, need))))
        self.slabs[-1].join(sequence)

    def _most(self, index: int) -> int:
        """The area of all slabs up to which that one may grow."""
        return (STRETCH + bool(index)) * self.tokens


def _rounded(tokens: int) -> int:
    """Up to a power of two, so that a slab seldom grows."""
    return max(LEAST_CAPACITY, 1 << (tokens - 1).bit_length())
