"""Heat maps as HTML: a page or a fragment that needs nothing else, and runs nothing.

Every text that comes from a model or a client is escaped; there is no script, and a page forbids itself to
load anything. Colours are never alone: words carry their numbers and an underline that tells the sign, and
all numbers are in a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from mlserver_hftasks.explain.scale import AGAINST, FOR, Scale
from mlserver_hftasks.explain.style import PAGE_STYLE, STYLE

if TYPE_CHECKING:
    from mlserver_hftasks.explain.reading import Piece, Reading, Target, Word

MAX_ALPHA = 0.6
LABELLED_SHARE = 0.12
"""A word whose share of the largest attribution is at least this has its number above it."""
SHOWN_WORDS = 8
"""Words in the table that is always open."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(readings: Sequence[Reading], title: str = "Explanation") -> str:
    """A whole document with the heat maps of these explanations."""
    sections = "".join(_sections(reading) for reading in readings)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{PAGE_STYLE}{STYLE}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{sections}</main></body></html>"
    )


def fragment(reading: Reading) -> str:
    """The heat maps of one explanation, to put into a page or a notebook."""
    return f"<style>{STYLE}</style>{_sections(reading)}"


def _sections(reading: Reading) -> str:
    if not reading.targets:
        text = escape(" ".join(reading.texts))
        return (
            f'<section class="hft"><p class="text">{text}</p><p>Nothing to explain: no target.</p></section>'
        )
    return "".join(_section(reading, index) for index in range(len(reading.targets)))


def _section(reading: Reading, index: int) -> str:
    target, words = reading.targets[index], reading.words(index)
    scale = Scale(word.attribution for word in words)
    place = reading.place(index)
    at = f" at <b>{escape(place)}</b>" if place else ""
    return (
        f'<section class="hft" aria-label="{escape(f"Why {target.label}")}">'
        f"<h2>Why <b>{escape(target.label)}</b>{at}?</h2>"
        f"{_numbers(target, scale)}{_warning(target, scale)}{_text(reading, index, scale)}"
        f"{_legend(target, scale)}{_tables(words, scale)}"
        f"<footer>{escape(reading.method)}, baseline {escape(reading.baseline)}, "
        f"{escape(str(reading.evaluations))} evaluations of the model</footer></section>"
    )


def _rgba(share: float, alpha: float) -> str:
    red, green, blue = FOR if share > 0 else AGAINST
    return f"rgba({red},{green},{blue},{alpha:.3g})"


def _numbers(target: Target, scale: Scale) -> str:
    pairs = (
        ("score", target.score),
        ("without the words", target.baseline_score),
        ("sum of the words", target.score - target.baseline_score + target.delta),
        ("delta", target.delta),
    )
    rows = (f"<div><dt>{name}</dt><dd>{scale.number(value)}</dd></div>" for name, value in pairs)
    return f"<dl>{''.join(rows)}</dl>"


def _warning(target: Target, scale: Scale) -> str:
    if target.converged:
        return ""
    return (
        '<p class="warn" role="note"><b>Not converged.</b> The numbers are less certain than was asked for '
        f"(delta {scale.number(target.delta)}): take them as a rough guide, or allow more evaluations or "
        "time.</p>"
    )


def _text(reading: Reading, index: int, scale: Scale) -> str:
    passages = ("".join(_piece(piece, scale) for piece in pieces) for pieces in reading.passages(index))
    return "".join(f'<p class="text" dir="auto">{passage}</p>' for passage in passages)


def _piece(piece: Piece, scale: Scale) -> str:
    text = escape(piece.text)
    if piece.explained:
        return f'<b class="answer" title="what is explained">{text}</b>'
    if piece.word is None:
        return text
    number, share = scale.number(piece.word.attribution), scale.share(piece.word.attribution)
    colour = f'style="background:{_rgba(share, MAX_ALPHA * abs(share))}"'
    title = f'title="{escape(f"{piece.word.text.strip()}: {number}")}"'
    if abs(share) < LABELLED_SHARE:
        return f"<mark {colour} {title}>{text}</mark>"
    sign = "for" if share > 0 else "against"
    return f'<mark class="{sign}" {colour} {title}><ruby>{text}<rt>{number}</rt></ruby></mark>'


def _legend(target: Target, scale: Scale) -> str:
    label, most = escape(target.label), scale.number(scale.largest)
    least = scale.number(-scale.largest)
    return (
        f'<p class="legend"><span>{least} against {label} (dashed)</span><i aria-hidden="true"></i>'
        f"<span>{most} for {label} (solid)</span></p>"
    )


def _tables(words: Sequence[Word], scale: Scale) -> str:
    ordered = sorted(words, key=lambda word: -abs(word.attribution))
    shown, rest = ordered[:SHOWN_WORDS], ordered[SHOWN_WORDS:]
    table = _table(shown, scale, "The weightiest words")
    if not rest:
        return table
    noun = "word" if len(rest) == 1 else "words"
    return (
        f"{table}<details><summary>{len(rest)} more {noun}</summary>{_table(rest, scale, 'The other words')}"
        "</details>"
    )


def _table(words: Sequence[Word], scale: Scale, caption: str) -> str:
    rows = "".join(_row(word, scale) for word in words)
    return f"<table><caption>{caption}</caption><tbody>{rows}</tbody></table>"


def _row(word: Word, scale: Scale) -> str:
    share = scale.share(word.attribution)
    width = 50 * abs(share)
    left = 50.0 if share > 0 else 50 - width
    return (
        f'<tr><th scope="row">{escape(word.text.strip())}</th>'
        f'<td class="n">{scale.number(word.attribution)}</td>'
        f'<td class="bar" aria-hidden="true"><i style="width:{width:.1f}%;margin-left:{left:.1f}%;'
        f'background:{_rgba(share, 0.85)}"></i></td></tr>'
    )
