"""Heat maps in a terminal. Colours are never alone: what speaks against is underlined, and numbers follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mlserver_hftasks.explain.reading import Piece, Reading, Target, Word
from mlserver_hftasks.explain.scale import AGAINST, FOR, Scale

BAR_CELLS = 24
SHOWN_WORDS = 10
VISIBLE_SHARE = 0.04
"""A word whose share of the largest attribution is less has no colour."""


def heat_maps(reading: Reading) -> Iterator[RenderableType]:
    """One panel per target of an explanation."""
    if not reading.targets:
        yield Panel(Text(" ".join(reading.texts)), title="nothing to explain", title_align="left")
    for index in range(len(reading.targets)):
        yield _panel(reading, index)


def _panel(reading: Reading, index: int) -> Panel:
    target, words, place = reading.targets[index], reading.words(index), reading.place(index)
    name = f"{target.label} at {place}" if place else target.label
    scale = Scale(word.attribution for word in words)
    parts: list[RenderableType] = [_numbers(target, scale)]
    if not target.converged:
        missed = scale.number(target.delta)
        parts.append(Text(f"Not converged: less certain than was asked for (delta {missed}).", "yellow"))
    below: list[RenderableType] = [_coloured(pieces, scale) for pieces in reading.passages(index)]
    parts += [Padding(part, (1, 0, 0, 0)) for part in [*below, _table(words, scale)]]
    how = f"{reading.method}, baseline {reading.baseline}, {reading.evaluations} evaluations"
    return Panel(
        Group(*parts),
        title=Text.assemble("Why ", (name, "bold"), "?"),
        title_align="left",
        subtitle=Text(how, "dim"),
        subtitle_align="left",
    )


def _numbers(target: Target, scale: Scale) -> Text:
    total = target.score - target.baseline_score + target.delta
    pairs = {
        "score": target.score,
        "without the words": target.baseline_score,
        "sum of the words": total,
        "delta": target.delta,
    }
    made = Text()
    for name, value in pairs.items():
        made.append(f"{name} ", "dim").append(f"{scale.number(value)}   ")
    return made


def _coloured(pieces: Sequence[Piece], scale: Scale) -> Text:
    made = Text()
    for piece in pieces:
        plain = "bold reverse" if piece.explained else ""
        made.append(piece.text, _style(scale.share(piece.word.attribution)) if piece.word else plain)
    return made


def _style(share: float) -> str:
    if abs(share) < VISIBLE_SHARE:
        return ""
    colour = FOR if share > 0 else AGAINST
    # On white, so that black letters are read on any of them, whatever the terminal's own colours are.
    red, green, blue = (round(255 + 0.75 * abs(share) * (part - 255)) for part in colour)
    return f"{'' if share > 0 else 'underline '}black on rgb({red},{green},{blue})"


def _table(words: Sequence[Word], scale: Scale) -> Table:
    table = Table.grid(padding=(0, 2))
    ordered = sorted(words, key=lambda word: -abs(word.attribution))
    for word in ordered[:SHOWN_WORDS]:
        number = Text(scale.number(word.attribution), justify="right")
        table.add_row(Text(word.text.strip()), number, _bar(scale.share(word.attribution)))
    if len(ordered) > SHOWN_WORDS:
        table.add_row(Text(f"{len(ordered) - SHOWN_WORDS} more", "dim"))
    return table


def _bar(share: float) -> Text:
    """To the left of the middle what speaks against, to the right what speaks for."""
    half = BAR_CELLS // 2
    cells = round(half * abs(share))
    if share < 0:
        return Text(" " * (half - cells) + "\u2588" * cells, f"rgb({','.join(map(str, AGAINST))})")
    return Text(" " * half + "\u2588" * cells, f"rgb({','.join(map(str, FOR))})")
