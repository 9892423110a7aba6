"""The next tokens of many sequences, each chosen by its own request's parameters.

Everything is computed for all rows of a step at once; rows that take the most likely token pay for an
argmax only. A drawn token depends on its own row's logits and its own request's generator: one number
between 0 and 1 per token, looked up in the cumulated probabilities.

Filters come in the order of `transformers.GenerationMixin`: repetition penalty, suppression, temperature,
top_k, top_p, min_p, each on what the one before left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mlserver_hftasks.engine.sequences import Choice, GeneratedSequence, Sampling
from mlserver_hftasks.generation.host_sampling import forbidden, looked_at, seen


def choose(logits: torch.Tensor, sequences: Sequence[GeneratedSequence]) -> list[Choice]:
    """One token per row of logits, [n, vocabulary] in float32."""
    changed = _penalised(logits, sequences)
    tokens = changed.argmax(dim=-1)
    drawing = [i for i, sequence in enumerate(sequences) if sequence.prompt.sampling.draw]
    if drawing:
        rows = changed if len(drawing) == len(sequences) else changed[drawing]
        tokens[drawing] = _draw(rows, [sequences[i] for i in drawing])
    logprobs = _logprobs(logits, tokens, sequences)
    return [Choice(token, logprob) for token, logprob in zip(tokens.tolist(), logprobs, strict=True)]


def _penalised(logits: torch.Tensor, sequences: Sequence[GeneratedSequence]) -> torch.Tensor:
    """Logits after what also applies without drawing; the same tensor if nothing does."""
    changed = logits
    for row, sequence in enumerate(sequences):
        penalty, banned = sequence.prompt.sampling.repetition_penalty, forbidden(sequence)
        if penalty == 1.0 and not banned:
            continue
        if changed is logits:
            changed = logits.clone()
        if penalty != 1.0:
            index = torch.from_numpy(seen(sequence)).to(logits.device)
            values = changed[row, index]
            changed[row, index] = torch.where(values < 0, values * penalty, values / penalty)
        if banned:
            changed[row, banned] = -torch.inf
    return changed


def _logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, sequences: Sequence[GeneratedSequence]
) -> list[float | None]:
    """Of the chosen tokens, for the rows that want them, before any filter."""
    wanting = [i for i, sequence in enumerate(sequences) if sequence.prompt.logprobs]
    found: list[float | None] = [None] * len(sequences)
    if wanting:
        rows = logits[wanting].log_softmax(dim=-1)
        values = rows.gather(1, tokens[wanting][:, None])[:, 0].tolist()
        for i, value in zip(wanting, values, strict=True):
            found[i] = value
    return found


def _draw(logits: torch.Tensor, sequences: Sequence[GeneratedSequence]) -> torch.Tensor:
    """A token per row. Rows are grouped by their own parameters, so that company changes nothing."""
    groups: dict[tuple[int, bool], list[int]] = {}
    for row, sequence in enumerate(sequences):
        sampling = sequence.prompt.sampling
        key = looked_at(sampling, logits.shape[-1]), bool(sampling.top_k)
        groups.setdefault(key, []).append(row)
    tokens = torch.empty(len(sequences), dtype=torch.int64, device=logits.device)
    for (count, _), rows in groups.items():
        samplings = [sequences[row].prompt.sampling for row in rows]
        uniform = _column([sequences[row].random.random() for row in rows], logits)
        scaled = logits[rows] / _column([sampling.temperature for sampling in samplings], logits)
        draw = _draw_from_all if count == 0 else _draw_from_best
        tokens[rows] = draw(scaled, uniform, samplings, count)
    return tokens


def _draw_from_all(
    scaled: torch.Tensor, uniform: torch.Tensor, samplings: Sequence[Sampling], count: int
) -> torch.Tensor:
    return _pick(scaled.double().softmax(dim=-1), uniform)


def _draw_from_best(
    scaled: torch.Tensor, uniform: torch.Tensor, samplings: Sequence[Sampling], count: int
) -> torch.Tensor:
    values, index = scaled.topk(count, dim=-1)
    # Without top_k the probabilities are those among all tokens, not among the ones looked at.
    total = values if samplings[0].top_k else scaled
    normaliser = total.double().logsumexp(dim=-1, keepdim=True)
    kept, covered = _filtered((values.double() - normaliser).exp(), samplings)
    if not samplings[0].top_k and not bool(covered.all()):
        values, index = scaled.sort(dim=-1, descending=True)
        kept, _ = _filtered((values.double() - normaliser).exp(), samplings)
    return index.gather(1, _pick(kept, uniform)[:, None])[:, 0]


def _filtered(
    probabilities: torch.Tensor, samplings: Sequence[Sampling]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What top_p and min_p leave of probabilities in falling order, and whether nothing beyond them would
    have been left, per row."""
    top_p = _column([sampling.top_p for sampling in samplings], probabilities)
    min_p = _column([sampling.min_p for sampling in samplings], probabilities)
    before = probabilities.cumsum(dim=-1) - probabilities
    keep = (before < top_p) & (probabilities >= min_p * probabilities[:, :1])
    keep[:, 0] = True
    return probabilities * keep, ~keep[:, -1]


def _pick(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The index at which the cumulated probabilities, in double, exceed that share of their sum, per row."""
    cumulated = probabilities.cumsum(dim=-1)
    total = cumulated[:, -1:]
    # The number may be rounded up to 1: below the sum, so that the token has a weight.
    target = torch.minimum(uniform.double() * total, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(cumulated, target, right=True)[:, 0]
    return place.clamp(max=probabilities.shape[-1] - 1)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
