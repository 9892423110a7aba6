"""Heat maps as HTML: a page or a fragment that needs nothing else, and runs nothing.

Every text that comes from a model or a client is escaped; there is no script, and a page forbids itself to
load anything. Colours are never alone: words carry their numbers and an underline that tells the sign, and
all numbers are in a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlserver_hftasks.explain.reading import Reading, Target, Word

FOR, AGAINST = "230,97,0", "26,110,235"
"""Orange and blue: told apart by people of any colour vision."""
MAX_ALPHA = 0.6
LABELLED_SHARE = 0.12
"""A word whose share of the largest attribution is at least this has its number above it."""
SHOWN_WORDS = 8
"""Words in the table that is always open."""

STYLE = f"""
.hft{{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;max-width:62rem;margin:0 0 1rem;
padding:1rem 1.25rem;border:1px solid rgba(128,128,128,.35);border-radius:10px}}
.hft h2{{font-size:1.05rem;font-weight:400;margin:0;display:inline-block}}
.hft h2 b{{font-size:1.15rem}}
.hft dl{{display:flex;flex-wrap:wrap;gap:.1rem 1.5rem;margin:.35rem 0 .6rem;font-size:.85rem}}
.hft dl div{{display:flex;gap:.4rem}}
.hft dt{{opacity:.7}}.hft dd{{margin:0;font-variant-numeric:tabular-nums}}
.hft .text{{font-size:1.12rem;line-height:2.5;margin:.2rem 0;white-space:pre-wrap;overflow-wrap:anywhere}}
.hft mark{{color:inherit;border-radius:4px;padding:.12em .16em;margin:0 -.04em;white-space:pre-wrap}}
.hft .for{{border-bottom:2px solid rgba({FOR},.9)}}
.hft .against{{border-bottom:2px dashed rgba({AGAINST},.95)}}
.hft rt{{font-size:.62em;font-variant-numeric:tabular-nums;opacity:.85;letter-spacing:-.01em;
transform:translateY(-.22em)}}
.hft .legend{{display:flex;align-items:center;gap:.6rem;font-size:.8rem;margin:.5rem 0 .7rem}}
.hft .legend i{{flex:0 1 14rem;height:.8rem;border-radius:4px;background:linear-gradient(90deg,
rgba({AGAINST},{MAX_ALPHA}),rgba({AGAINST},0) 50%,rgba({FOR},0) 50%,rgba({FOR},{MAX_ALPHA}))}}
.hft table{{border-collapse:collapse;font-size:.85rem;text-align:left}}
.hft caption{{text-align:left;opacity:.7;font-size:.8rem;padding:.2rem 0}}
.hft th,.hft td{{padding:.1rem .9rem .1rem 0;font-weight:400;background:none;border:0;text-align:left}}
.hft td.n{{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}}
.hft td.bar{{width:16rem;padding:0}}
.hft td.bar i{{display:block;height:.7rem;border-radius:3px}}
.hft details summary{{cursor:pointer;font-size:.8rem;opacity:.75;margin:.3rem 0}}
.hft .warn{{margin:.3rem 0 .6rem;padding:.4rem .7rem;border-left:4px solid #b58900;
background:rgba(181,137,0,.14);font-size:.88rem}}
.hft footer{{font-size:.78rem;opacity:.65;margin-top:.5rem}}
"""
PAGE_STYLE = (
    ":root{color-scheme:light dark}body{margin:1.5rem auto;max-width:64rem;padding:0 1rem;"
    "background:Canvas;color:CanvasText}h1{font:600 1.2rem system-ui,sans-serif}"
)
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
    largest = max((abs(word.attribution) for word in words), default=0.0)
    scale = _Scale(largest)
    return (
        f'<section class="hft" aria-label="{escape(f"Why {target.label}")}">'
        f"<h2>Why <b>{escape(target.label)}</b>{_place(reading, target)}?</h2>"
        f"{_numbers(target, scale)}{_warning(target, scale)}{_text(reading, words, scale)}"
        f"{_legend(target, scale)}{_tables(words, scale)}"
        f"<footer>{escape(reading.method)}, baseline {escape(reading.baseline)}, "
        f"{reading.evaluations} evaluations of the model</footer></section>"
    )


class _Scale:
    """From attributions to colours and to texts, relative to the largest."""

    def __init__(self, largest: float) -> None:
        self.largest = largest
        digits = 2 if largest <= 0 else 1 - math.floor(math.log10(largest))
        self._digits = min(max(digits, 2), 8)

    def share(self, value: float) -> float:
        """From -1 to 1."""
        return value / self.largest if self.largest else 0.0

    def number(self, value: float) -> str:
        """With its sign, and as many digits as tell the words apart."""
        rounded = round(value, self._digits)
        sign = "+" if rounded > 0 else "\u2212" if rounded < 0 else ""
        return f"{sign}{abs(rounded):.{self._digits}f}"

    def colour(self, value: float) -> str:
        """Of the background, as CSS."""
        share = self.share(value)
        return f"rgba({FOR if share > 0 else AGAINST},{MAX_ALPHA * abs(share):.3f})"


def _place(reading: Reading, target: Target) -> str:
    """Which token the score is of, where it is of one."""
    if not 0 <= target.position < len(reading.tokens):
        return ""
    return f" at <b>{escape(reading.tokens[target.position])}</b>"


def _numbers(target: Target, scale: _Scale) -> str:
    pairs = (
        ("score", target.score),
        ("without the words", target.baseline_score),
        ("sum of the words", target.score - target.baseline_score + target.delta),
        ("delta", target.delta),
    )
    rows = (f"<div><dt>{name}</dt><dd>{scale.number(value)}</dd></div>" for name, value in pairs)
    return f"<dl>{''.join(rows)}</dl>"


def _warning(target: Target, scale: _Scale) -> str:
    if target.converged:
        return ""
    return (
        '<p class="warn" role="note"><b>Not converged.</b> The numbers miss the score by '
        f"{scale.number(target.delta)}: take them as a rough guide, or allow more evaluations or time.</p>"
    )


def _text(reading: Reading, words: Sequence[Word], scale: _Scale) -> str:
    paragraphs = groupby(words, key=lambda word: word.sequence)
    return "".join(
        f'<p class="text" dir="auto">{"".join(_marked(reading, list(own), scale))}</p>'
        for _, own in paragraphs
    )


def _marked(reading: Reading, words: Sequence[Word], scale: _Scale) -> Iterator[str]:
    """The words with what is between them in their text, or a space where nobody knows."""
    position = 0
    for number, word in enumerate(words):
        if word.start >= 0:
            yield escape(reading.texts[word.sequence][position : word.start])
            position = word.end
        elif number:
            yield " "
        yield _mark(word, scale)
    if words and words[-1].start >= 0:
        yield escape(reading.texts[words[-1].sequence][position:])


def _mark(word: Word, scale: _Scale) -> str:
    share, text, number = scale.share(word.attribution), escape(word.text), scale.number(word.attribution)
    title = escape(f"{word.text.strip()}: {number}")
    if abs(share) < LABELLED_SHARE:
        return f'<mark style="background:{scale.colour(word.attribution)}" title="{title}">{text}</mark>'
    sign = "for" if share > 0 else "against"
    return (
        f'<mark class="{sign}" style="background:{scale.colour(word.attribution)}" title="{title}">'
        f"<ruby>{text}<rt>{number}</rt></ruby></mark>"
    )


def _legend(target: Target, scale: _Scale) -> str:
    label, most = escape(target.label), scale.number(scale.largest)
    least = scale.number(-scale.largest)
    return (
        f'<p class="legend"><span>{least} against {label} (dashed)</span><i aria-hidden="true"></i>'
        f"<span>{most} for {label} (solid)</span></p>"
    )


def _tables(words: Sequence[Word], scale: _Scale) -> str:
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


def _table(words: Sequence[Word], scale: _Scale, caption: str) -> str:
    rows = "".join(_row(word, scale) for word in words)
    return f"<table><caption>{caption}</caption><tbody>{rows}</tbody></table>"


def _row(word: Word, scale: _Scale) -> str:
    share = scale.share(word.attribution)
    width = 50 * abs(share)
    left = 50.0 if share > 0 else 50 - width
    colour = f"rgba({FOR if share > 0 else AGAINST},.85)"
    return (
        f'<tr><th scope="row">{escape(word.text.strip())}</th>'
        f'<td class="n">{scale.number(word.attribution)}</td>'
        f'<td class="bar" aria-hidden="true"><i style="width:{width:.1f}%;margin-left:{left:.1f}%;'
        f'background:{colour}"></i></td></tr>'
    )
