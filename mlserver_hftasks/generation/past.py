"""A decoder in Optimum's layout, run by ONNX Runtime: its cache goes in, and comes out longer.

Inputs `input_ids` [n, S], `past_key_values.L.key` and `.value` [n, heads, past, d], and those of
`attention_mask`, `position_ids`, `use_cache_branch` and `num_logits_to_keep` that the file has; outputs
`logits` [n, S, vocabulary], `present.L.key` and `present.L.value`. (Optimum's `text-generation-with-past`:
https://huggingface.co/docs/optimum-onnx/onnx/usage_guides/export_a_model)

Such a program copies its cache in every step, so programs of our own are faster. A prompt goes in whole and
by itself. Sequences that decode share a batch, padded on the left, as long as nobody joins or leaves; else
the batch is laid out anew. What is padded is no more than the cache that the engine reckons with: beyond,
sequences of like lengths share a batch each. A file that does not give each sequence its own answer in such
a batch is run with one sequence at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mlserver_hftasks.backends.base import Description
from mlserver_hftasks.engine.rows import FloatArray, IntArray
from mlserver_hftasks.engine.sequences import Choice, Chunk, GeneratedSequence
from mlserver_hftasks.generation.host_sampling import choose
from mlserver_hftasks.generation.slabs import CacheShape

PAST, PRESENT = "past_key_values", "present"
IDS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
BRANCH, KEPT_LOGITS = "use_cache_branch", "num_logits_to_keep"
KNOWN = frozenset({IDS, MASK, POSITIONS, BRANCH, KEPT_LOGITS})
"""Inputs beside the cache."""

Cache = Sequence[npt.NDArray[Any]]
"""Keys and values by turns, layer by layer."""


@dataclass(frozen=True)
class Batch:
    """Sequences that went through the program together, and their cache, [n, heads, longest, d] each."""

    sequences: tuple[GeneratedSequence, ...]
    lengths: tuple[int, ...]
    """Tokens of each; what is before them is padding."""
    cache: Sequence[Any]
    """`OrtValue`s, to be handed on as they are."""

    def of(self, sequence: GeneratedSequence, tokens: int) -> Cache:
        """The first tokens of a sequence, [heads, tokens, d] each."""
        row = self.sequences.index(sequence)
        begin = max(self.lengths) - self.lengths[row]
        return [array[row, :, begin : begin + tokens] for array in self._arrays]

    @cached_property
    def _arrays(self) -> Cache:
        return [value.numpy() for value in self.cache]


class PastDecoder:
    """Steps through such a program, several sequences at a time if `batched`; see `Stepper`."""

    def __init__(
        self, session: Any, *, cache_tokens: int, description: Description, batched: bool = True
    ) -> None:
        self._session = session
        self._inputs = {each.name: each for each in session.get_inputs()}
        self._layers = cache_shape_of(session).layers
        self._outputs = [LOGITS, *cache_names(PRESENT, self._layers)]
        self._batches: list[Batch] = []
        self._stepping: frozenset[GeneratedSequence] = frozenset()
        """Of the step that runs: who is cancelled meanwhile still goes through it."""
        self.cache_tokens, self.description, self.batched = cache_tokens, description, batched

    def step(self, chunks: Sequence[Chunk]) -> Sequence[Choice | None]:
        """See `engine.sequences.Stepper`."""
        choosing = [chunk.sequence for chunk in chunks if chunk.chooses]
        chosen = iter(choose(self.logits(chunks), choosing) if choosing else ())
        return [next(chosen) if chunk.chooses else None for chunk in chunks]

    def logits(self, chunks: Sequence[Chunk]) -> FloatArray:
        """Logits after each of the chunks that choose, [n, vocabulary]."""
        self._stepping = frozenset(chunk.sequence for chunk in chunks)
        self._forget_done()
        found: dict[int, FloatArray] = {}
        decoding = [chunk for chunk in chunks if chunk.sequence.decodes]
        for chunk in chunks:
            if chunk.chooses and not chunk.sequence.decodes:  # a piece that is not the last waits for it
                found.update(self._prompt(chunk))
        for group in self._groups(decoding):
            found.update(self._decode(group))
        rows = [found[id(chunk)] for chunk in chunks if chunk.chooses]
        return np.stack(rows) if rows else np.empty((0, 0), np.float32)

    def beside(self, cache_tokens: int) -> PastDecoder:
        """Another over the same program, with a cache of its own."""
        return PastDecoder(
            self._session, cache_tokens=cache_tokens, description=self.description, batched=self.batched
        )

    def close(self) -> None:
        """Give the memory back; `step` must not be called again."""
        self._batches.clear()
        del self._session

    def _groups(self, decoding: Sequence[Chunk]) -> list[list[Chunk]]:
        """Chunks that run together, of like lengths: padded they fit into the cache."""
        if not self.batched:
            return [[chunk] for chunk in decoding]
        groups: list[list[Chunk]] = []
        for chunk in sorted(decoding, key=lambda chunk: -chunk.position):
            if groups and (len(groups[-1]) + 1) * groups[-1][0].position <= self.cache_tokens:
                groups[-1].append(chunk)
            else:
                groups.append([chunk])
        return groups

    def _prompt(self, chunk: Chunk) -> Mapping[int, FloatArray]:
        tokens = chunk.sequence.prompt.tokens
        cache = [self._empty(name) for name in cache_names(PAST, self._layers)]
        return self._run([chunk], tokens[None], (0,), cache)

    def _decode(self, chunks: Sequence[Chunk]) -> Mapping[int, FloatArray]:
        lengths = tuple(chunk.position for chunk in chunks)
        sequences = tuple(chunk.sequence for chunk in chunks)
        ids = np.array([chunk.tokens for chunk in chunks], dtype=np.int64)
        for batch in self._batches:
            if batch.sequences == sequences and batch.lengths == lengths:
                return self._run(chunks, ids, lengths, batch.cache)
        return self._run(chunks, ids, lengths, self._laid_out(sequences, lengths))

    def _run(
        self, chunks: Sequence[Chunk], ids: IntArray, past: tuple[int, ...], cache: Sequence[Any]
    ) -> Mapping[int, FloatArray]:
        from onnxruntime import OrtValue

        feed = {name: OrtValue.ortvalue_from_numpy(array) for name, array in self._feed(ids, past).items()}
        feed |= dict(zip(cache_names(PAST, self._layers), cache, strict=True))
        logits, *extended = self._session.run_with_ort_values(self._outputs, feed)
        sequences = tuple(chunk.sequence for chunk in chunks)
        lengths = tuple(length + ids.shape[1] for length in past)
        self._batches.append(Batch(sequences, lengths, extended))
        self._forget_done()
        last = np.asarray(logits.numpy()[:, -1], np.float32)
        return {id(chunk): row for chunk, row in zip(chunks, last, strict=True)}

    def _forget_done(self) -> None:
        """Keep, of each sequence that has not left or still runs, the newest batch."""
        kept: list[Batch] = []
        seen: set[GeneratedSequence] = set()
        for batch in reversed(self._batches):
            here = {each for each in batch.sequences if each.extent >= 0 or each in self._stepping}
            if here - seen:
                kept.append(batch)
            seen |= here
        self._batches = kept[::-1]

    def _feed(self, ids: IntArray, past: tuple[int, ...]) -> dict[str, npt.NDArray[Any]]:
        before, new = np.array(past)[:, None], ids.shape[1]
        place = np.arange(before.max() + new)
        made = {
            IDS: ids,
            MASK: (place >= before.max() - before).astype(np.int64),
            POSITIONS: before + np.arange(new),
            BRANCH: np.array([bool(before.max())]),
            KEPT_LOGITS: np.array(1, np.int64),
        }
        return {name: array for name, array in made.items() if name in self._inputs}

    def _laid_out(self, sequences: Sequence[GeneratedSequence], lengths: Sequence[int]) -> list[Any]:
        """The caches of the sequences in one batch, padded on the left."""
        from onnxruntime import OrtValue

        parts = [self._cache_of(each, length) for each, length in zip(sequences, lengths, strict=True)]
        made = []
        for pieces in zip(*parts, strict=True):
            heads, _, width = pieces[0].shape
            whole = np.zeros((len(pieces), heads, max(lengths), width), pieces[0].dtype)
            for row, piece in enumerate(pieces):
                whole[row, :, max(lengths) - piece.shape[1] :] = piece
            made.append(OrtValue.ortvalue_from_numpy(whole))
        return made

    def _cache_of(self, sequence: GeneratedSequence, tokens: int) -> Cache:
        """The newest batch that has the sequence has all of its tokens."""
        for batch in reversed(self._batches):
            if sequence in batch.sequences:
                return batch.of(sequence, tokens)
        raise LookupError("a sequence that left before its step")

    def _empty(self, name: str) -> Any:
        from onnxruntime import OrtValue

        _, heads, _, width = self._inputs[name].shape
        dtype = np.float16 if self._inputs[name].type == "tensor(float16)" else np.float32
        return OrtValue.ortvalue_from_numpy(np.zeros((1, heads, 0, width), dtype))


def cache_names(prefix: str, layers: int) -> list[str]:
    """Of the keys and values, as inputs or outputs."""
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def cache_shape_of(session: Any) -> CacheShape:
    """Of the cache that the program takes. Raises ValueError, with the reason, if it takes none."""
    shapes = {each.name: each.shape for each in session.get_inputs()}
    layers = sum(name.startswith(f"{PAST}.") for name in shapes) // 2
    if missing := [name for name in cache_names(PAST, max(layers, 1)) if name not in shapes]:
        raise ValueError(f"has no {missing[0]}")
    if unknown := sorted(set(shapes) - KNOWN - set(cache_names(PAST, layers))):
        raise ValueError(f"takes {', '.join(unknown)}")
    if LOGITS not in (outputs := {each.name for each in session.get_outputs()}):
        raise ValueError(f"gives {', '.join(sorted(outputs))}")
    shape = shapes[cache_names(PAST, 1)[0]]
    if len(shape) != 4 or not (isinstance(shape[1], int) and isinstance(shape[3], int)):
        raise ValueError(f"has a cache of the shape {shape}")
    return CacheShape(layers, shape[1], shape[3])
