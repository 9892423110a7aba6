"""Gradients of a model's scores with respect to its token embeddings, along a straight path.

A model that serves predictions is left alone: gradients run through a clone of its modules that shares
the weights. There the output of the embedding layer, and nothing else, is replaced by a point between a
baseline and the tokens' own embeddings. Token ids and masks stay as they are, since some models read more
from them: RoBERTa its positions, GPT-2 where to pool.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlserver_hftasks.backends import feeds
from mlserver_hftasks.backends import probe as probing
from mlserver_hftasks.backends.base import Level
from mlserver_hftasks.engine.rows import FloatArray, Outputs, Row

if TYPE_CHECKING:
    from mlserver_hftasks.backends.torch import TorchBackend

logger = logging.getLogger("mlserver.hftasks")

Score = Callable[[Mapping[str, Tensor]], Tensor]
"""From the outputs of one row, as `Backend.forward` gives them but as tensors, to its scores [K]."""
Absent = int | Literal["mean", "zero"]
"""What stands for an absent token: the embedding of a token, the mean of all, or nothing."""

TOLERANCE = 1e-3
"""By how much, relative to the largest output, the clone may differ from the model."""
CHUNK = 4096
"""Embeddings that are averaged at a time."""


@dataclass(frozen=True, slots=True)
class ScoredRow(Row):
    """A row of which only a few numbers are wanted: `score` makes them of its outputs."""

    score: Score = field(default=lambda outputs: torch.zeros(0))


@dataclass(frozen=True, slots=True)
class PathRow(ScoredRow):
    """A row at the point `alpha` between its baseline (0) and itself (1).

    `kept`, [tokens], says which tokens are never absent.
    """

    alpha: float = 1.0
    absent: Absent = "zero"
    kept: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))


@runtime_checkable
class Differentiable(Protocol):
    """A backend that has gradients, or may have."""

    def gradients(self) -> PathBackend | None:
        """Scores and gradients of the same model, apart from its predictions; None if it has none.

        The first call takes a while, and must not come while rows run.
        """


class PathBackend:
    """Runs `PathRow`s. Called from one thread at a time, which may be another than the predictions'.

    `pause` is called after each product with a matrix of weights, forward and backward, so every few
    milliseconds: whoever sets it can hold the work up there.
    """

    def __init__(self, clone: TorchBackend) -> None:
        self._clone = clone
        self._embeddings = _Embeddings(clone._model.get_input_embeddings())
        self._absents: dict[Absent, Tensor] = {}
        self.padded = clone.padded
        self.device = clone._device
        self.pause: Callable[[], object] = lambda: None
        for module in products_of(clone._model.base_model):
            module.register_forward_hook(self._after_forward)

    @classmethod
    def of(cls, backend: TorchBackend) -> PathBackend | None:
        """The gradients of a backend that runs nothing at the moment, or None where they cannot be had."""
        shared = {id(weight): weight for weight in backend._model.parameters()}
        try:
            made = cls(copy.deepcopy(backend, memo=shared))
            made._check()
        except Exception as error:  # whatever an architecture makes of a clone, or of replaced embeddings
            logger.info("%s has no gradients: %r", type(backend._model).__name__, error)
            return None
        return made

    def forward(self, rows: Sequence[Row]) -> Sequence[Outputs]:
        """Per `PathRow` its `score` [K], and `contribution` [K, tokens].

        The contribution is the gradient of the score times the way from the baseline to the row, summed over
        the embedding's dimensions. Its integral over `alpha` from 0 to 1 are integrated gradients
        (https://arxiv.org/abs/1703.01365).
        """
        return feeds.gathered(rows, feeds.alike(rows, self._clone._marker), self._in_passes)

    def _in_passes(self, rows: Sequence[Row]) -> list[Outputs]:
        return [
            outputs
            for part in self._clone._passes(rows)
            for outputs in self._forward([row for row in part if isinstance(row, PathRow)])
        ]

    def close(self) -> None:
        """Give the memory back; `forward` must not be called again."""
        self._embeddings.release()
        self._absents.clear()
        self._clone.close()

    def _forward(self, rows: Sequence[PathRow]) -> list[Outputs]:
        with torch.enable_grad():
            point, way = self._points(rows)
            with self._embeddings.replaced(point, [row.cost for row in rows]):
                outputs = self._clone._outputs(rows)
            by_row = zip(rows, self._by_row(outputs, rows), strict=True)
            scores = [row.score(of_row).float() for row, of_row in by_row]
        contributions = _contributions(scores, point, way)
        bounds = np.cumsum([0, *(row.cost for row in rows)])
        return [
            {"score": score.detach().cpu().numpy(), "contribution": contributions[: len(score), start:end]}
            for score, start, end in zip(scores, bounds[:-1], bounds[1:], strict=True)
        ]

    @torch.no_grad()
    def _points(self, rows: Sequence[PathRow]) -> tuple[Tensor, Tensor]:
        """The rows' embeddings end to end, and the way there from their baselines, both [tokens, hidden]."""
        device = self._clone._device
        costs = torch.tensor([row.cost for row in rows])
        own = self._embeddings.of(np.concatenate([row.arrays["input_ids"] for row in rows]), device).float()
        absent = torch.stack([self._absent(row.absent) for row in rows]).repeat_interleave(
            costs.to(device), dim=0
        )
        kept = torch.from_numpy(np.concatenate([row.kept for row in rows])).to(device)
        left = torch.tensor([1 - row.alpha for row in rows]).repeat_interleave(costs).to(device)
        way = (own - absent).masked_fill_(kept[:, None], 0)
        point = torch.addcmul(own, left[:, None], way, value=-1).to(self._clone._model.dtype)
        return point.requires_grad_(), way

    def _absent(self, absent: Absent) -> Tensor:
        """[hidden], kept once it was made: a mean over a vocabulary takes a while."""
        if absent not in self._absents:
            self._absents[absent] = self._made(absent)
        return self._absents[absent]

    def _made(self, absent: Absent) -> Tensor:
        device = self._clone._device
        if isinstance(absent, int):
            return self._embeddings.of(np.array([absent]), device)[0].float()
        count = self._embeddings.count
        chunks = [np.arange(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
        total = sum(self._embeddings.of(chunk, device).float().sum(0) for chunk in chunks)
        assert isinstance(total, Tensor)
        return total / count if absent == "mean" else torch.zeros_like(total)

    def _by_row(self, outputs: Any, rows: Sequence[Row]) -> list[dict[str, Tensor]]:
        """As `TorchBackend._split`, in tensors."""
        head = self._clone._head.outputs
        return [
            {
                name: outputs[name][index]
                if level is Level.SEQUENCE
                else outputs[name][index, : row.cost if row.select is None else len(row.select)]
                for name, level in head.items()
            }
            for index, row in enumerate(rows)
        ]

    def _after_forward(self, module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        self.pause()
        if outputs.requires_grad:
            outputs.register_hook(self._after_backward)

    def _after_backward(self, gradient: Tensor) -> None:
        self.pause()

    def _check(self) -> None:
        """Raise unless rows at the end of their path give what the model says, with gradients."""
        config = self._clone._model.config
        rows = probing.random_rows(self._embeddings.count, config)
        name = next(iter(self._clone._head.outputs))
        ends = [
            PathRow(
                row.arrays,
                kept=np.zeros(row.cost, dtype=np.bool_),
                score=lambda outputs: outputs[name].flatten()[:1],
            )
            for row in rows
        ]
        for of_row, got in zip(self._clone.forward(rows), self.forward(ends), strict=True):
            expected = of_row[name].ravel()[0]
            if not abs(expected - got["score"][0]) <= TOLERANCE * max(1.0, float(np.abs(of_row[name]).max())):
                raise ValueError(f"its clone gives {got['score'][0]} in place of {expected}")
            if not (np.isfinite(got["contribution"]).all() and got["contribution"].any()):
                raise ValueError("its gradients vanish, or are not finite")


class _Embeddings:
    """Stands in for `forward` of an embedding layer, and gives what it is told to."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._forward = layer.forward
        self.count: int = layer.weight.shape[0]
        self._point: Tensor | None = None
        self._costs: Sequence[int] = ()
        self._calls = 0
        layer.forward = self

    def of(self, ids: npt.NDArray[np.int64], device: torch.device) -> Tensor:
        """The layer's own embeddings, [tokens] -> [tokens, hidden]."""
        own: Tensor = self._forward(torch.from_numpy(ids).to(device)[None])[0]
        return own

    def release(self) -> None:
        """Give the layer its own `forward` back."""
        del self._layer.forward

    @contextmanager
    def replaced(self, point: Tensor, costs: Sequence[int]) -> Iterator[None]:
        """Within it the layer gives `point`, the embeddings of rows of these costs end to end.

        Raises RuntimeError at the end unless the layer was called exactly once.
        """
        self._point, self._costs, self._calls = point, costs, 0
        try:
            yield
        finally:
            self._point = None
        if self._calls != 1:
            raise RuntimeError(f"the embedding layer was called {self._calls} times in one forward pass")

    def __call__(self, input_ids: Tensor) -> Tensor:
        own: Tensor = self._forward(input_ids)
        if self._point is None:
            return own
        self._calls += 1
        if input_ids.numel() == len(self._point):
            return self._point.view(*input_ids.shape, -1)
        lengths = torch.tensor(self._costs, device=own.device)[:, None]
        present = torch.arange(input_ids.shape[1], device=own.device)[None] < lengths
        own[present] = self._point
        return own


def _contributions(scores: Sequence[Tensor], point: Tensor, way: Tensor) -> FloatArray:
    """[K, tokens]: for each k one backward pass, over the rows that have so many scores."""
    contributions = np.zeros((max(map(len, scores), default=0), len(way)), dtype=np.float32)
    for k in range(len(contributions)):
        total = torch.stack([score[k] for score in scores if len(score) > k]).sum()
        last = k == len(contributions) - 1
        (gradient,) = torch.autograd.grad(total, point, retain_graph=not last)
        contributions[k] = (gradient.float() * way).sum(-1).cpu().numpy()
    return contributions


def products_of(backbone: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that multiply by a matrix."""
    weights = ((module, getattr(module, "weight", None)) for module in backbone.modules())
    return [
        module
        for module, weight in weights
        if isinstance(weight, Tensor) and weight.ndim >= 2 and not isinstance(module, torch.nn.Embedding)
    ]
