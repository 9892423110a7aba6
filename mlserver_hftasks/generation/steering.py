"""What acts on single rows within one call of `generate()`: who draws how, who stops when.

`generate()` knows one set of parameters for a whole batch and one random generator for a whole process.
Rows of different clients need their own seeds, limits and ends; and what looks at earlier tokens must not
see the padding before a prompt.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as processing

from mlserver_hftasks.engine.rows import Decoding
from mlserver_hftasks.engine.sequences import FinishReason

WARPERS = (
    ("temperature", 1.0, processing.TemperatureLogitsWarper),
    ("top_h", None, processing.TopHLogitsWarper),
    ("top_k", 0, processing.TopKLogitsWarper),
    ("top_p", 1.0, processing.TopPLogitsWarper),
    ("min_p", None, processing.MinPLogitsWarper),
    ("typical_p", 1.0, processing.TypicalLogitsWarper),
    ("epsilon_cutoff", 0.0, processing.EpsilonLogitsWarper),
)
"""What narrows a draw, in the order of `GenerationMixin`: a setting, the value without effect, the class."""
USUAL_TOP_K = 50
"""`generate()` draws among so many tokens where nobody says otherwise."""
LEAST_NOISE = 1e-30
STOP_LOOKBACK_TOKENS = 8
"""Tokens that a stop text is looked for in, beyond one for each of its bytes: some decode to nothing."""

_process_generator = threading.Lock()
"""Held by who draws from torch's own random generators, of which a process has one per device."""

Decode = Callable[[list[int]], str]
Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From the tokens so far [n, tokens] and the scores of the next one [n, vocabulary] to other scores."""


def warpers_of(config: GenerationConfig, device: torch.device) -> list[Processor]:
    """What `generate()` would narrow its draws with."""
    made: list[Processor] = []
    for name, neutral, warper in WARPERS:
        value = getattr(config, name, None)
        if name == "top_k" and value is None:
            value = USUAL_TOP_K
        if value is not None and value != neutral:
            made.append(warper(value))
    if config.eta_cutoff:
        made.append(processing.EtaLogitsWarper(config.eta_cutoff, device=device))
    return made


class Draw:
    """Makes the most likely token a drawn one: adds noise of Gumbel's distribution, from each row's own seed.

    The largest of `logits + noise` is distributed like a draw from their softmax (Gumbel 1954; see
    https://arxiv.org/abs/1411.0030), so a row's draw hangs on nothing but its logits and its seed.
    """

    def __init__(
        self, warpers: Sequence[Processor], seeds: Sequence[int | None], device: torch.device
    ) -> None:
        self._warpers = warpers
        self._generators = [
            torch.Generator(device).manual_seed(secrets.randbits(63) if seed is None else seed)
            for seed in seeds
        ]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Narrowed and noisy scores; see `Processor`."""
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        noise = torch.empty_like(scores)
        for part, generator in zip(noise.chunk(len(self._generators)), self._generators, strict=True):
            part.exponential_(generator=generator)
        return scores - noise.clamp_(min=LEAST_NOISE).log_()


@contextmanager
def drawing_from(seed: int | None) -> Iterator[None]:
    """torch's own generators begin at the seed, and are afterwards where they were."""
    with _process_generator, torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        else:
            torch.seed()
        yield


class First:
    """Begins the answers of each row with the token that is given for it."""

    def __init__(self, tokens: Sequence[int | None], prompt_tokens: int) -> None:
        self._tokens = tokens
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """At the first step, scores that leave no choice; see `Processor`."""
        if input_ids.shape[1] > self._prompt_tokens:
            return scores
        changed = scores.clone()
        for part, token in zip(changed.chunk(len(self._tokens)), self._tokens, strict=True):
            if token is not None:
                part.fill_(-torch.inf)
                part[:, token] = 0
        return changed


class Unpadded:
    """A processor that looks at earlier tokens, shown those of each row without the padding before them."""

    def __init__(self, processor: Processor, padding: Sequence[int]) -> None:
        self._processor = processor
        self._padding = padding

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The processor's scores, row by row."""
        rows = len(self._padding)
        parts = zip(self._padding, input_ids.chunk(rows), scores.chunk(rows), strict=True)
        return torch.cat([self._processor(ids[:, padding:], part) for padding, ids, part in parts])


class Watch:
    """Ends single sequences, and remembers when: at their row's own limit, at a stop text, when nobody waits
    any more or waits no longer.

    Of a beam search it is shown candidates: those of a row lie together, as sequences do else.
    """

    def __init__(
        self,
        rows: Sequence[Decoding],
        prompt_tokens: int,
        ends: frozenset[int],
        stop: Sequence[str],
        decode: Decode,
    ) -> None:
        self._rows = rows
        self._prompt_tokens = prompt_tokens
        self._ends = ends
        self._stop = stop
        self._decode = decode
        self._lookback = max((len(text.encode()) for text in stop), default=0) + STOP_LOOKBACK_TOKENS
        self._late: set[int] = set()
        self._ended: dict[int, int] = {}
        """Number of new tokens of each sequence when it was ended; means nothing where there are beams."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Which of the sequences [n, tokens] end here, [n]: a stopping criterion of `generate()`."""
        count = input_ids.shape[1] - self._prompt_tokens
        per_row = len(input_ids) // len(self._rows)
        done = [over for row in self._rows_over(count) for over in [row] * per_row]
        if self._stop:
            tails = input_ids[:, -min(count, self._lookback) :].tolist()
            done = [over or self._stops(tail) for over, tail in zip(done, tails, strict=True)]
        for index, over in enumerate(done):
            if over:
                self._ended.setdefault(index, count)
        return torch.tensor(done, device=input_ids.device)

    def kept(self, index: int, tokens: list[int]) -> list[int]:
        """The new tokens of a sequence, not of beams, without those that came after its end."""
        kept = tokens[: self._ended.get(index, len(tokens))]
        end = next((place for place, token in enumerate(kept) if token in self._ends), len(kept))
        return kept[: end + 1]

    def reason(self, row: int, tokens: list[int]) -> FinishReason:
        """Why an answer of that row ended with these tokens."""
        if tokens and tokens[-1] in self._ends:
            return FinishReason.EOS
        if self._stop and self._stops(tokens):
            return FinishReason.STOP
        return FinishReason.TIMEOUT if row in self._late else FinishReason.LENGTH

    def _stops(self, new_tokens: list[int]) -> bool:
        text = self._decode(new_tokens[-self._lookback :])
        return any(stop in text for stop in self._stop)

    def _rows_over(self, count: int) -> list[bool]:
        now = time.monotonic()
        self._late |= {index for index, row in enumerate(self._rows) if row.abandoned or now > row.until}
        return [index in self._late or count >= row.max_new_tokens for index, row in enumerate(self._rows)]
