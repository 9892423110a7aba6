"""Explanations as a person reads them: words, numbers, and a page that runs nothing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlserver_hftasks.explain.html import fragment, page
from mlserver_hftasks.explain.reading import Reading
from mlserver_hftasks.explain.record import json_of
from mlserver_hftasks.explain.result import Explanation
from tests.explanations import SENTENCE, explanation

HOSTILE = "x<img src=y onerror=alert(1)>&amp;\"'><script>alert(2)</script>{{7}}"


def reading(one: Explanation) -> Reading:
    return Reading.of(json.loads(json_of(one)))


def test_words_are_those_of_the_text_and_their_pieces_add_up() -> None:
    one = explanation()
    words = reading(one).words()
    assert [word.text for word in words] == re.findall(r"\w+|[^\w\s]", SENTENCE)
    assert all(SENTENCE[word.start : word.end] == word.text for word in words)
    delicious = one.attributions[0][one.word_ids == 3].sum()
    assert words[3].attribution == pytest.approx(delicious, abs=1e-6)
    assert sum(word.attribution for word in words) == pytest.approx(one.attributions[0].sum(), abs=1e-5)


def test_code_points_not_bytes() -> None:
    words = reading(explanation(("\U0001f600 cafe\u0301 \U0001f468\u200d\U0001f469",), pieces=20)).words()
    assert words[0].text == "\U0001f600"


def test_a_word_of_both_texts_of_a_pair_is_two_words() -> None:
    words = reading(explanation(("same one", "same two"))).words()
    assert [(word.text, word.sequence) for word in words] == [
        ("same", 0), ("one", 0), ("same", 1), ("two", 1),
    ]  # fmt: skip


def test_without_offsets_words_are_put_together_from_tokens() -> None:
    one = explanation(("delicious soup",))
    nowhere = np.full_like(one.offsets, -1)
    words = reading(explanation(("delicious soup",), offsets=nowhere)).words()
    assert [(word.text, word.start) for word in words] == [("delicious", -1), ("soup", -1)]


def test_without_words_every_token_is_one() -> None:
    one = explanation(("delicious soup",))
    words = reading(explanation(("delicious soup",), word_ids=np.full_like(one.word_ids, -1))).words()
    assert [word.text for word in words] == ["deli", "ciou", "s", "soup"]


def test_words_of_another_target() -> None:
    one = explanation(labels=("A", "B"))
    both = reading(one)
    assert [word.attribution for word in both.words(1)] != [word.attribution for word in both.words()]


def test_the_place_of_a_score_is_a_word() -> None:
    one = explanation(("delicious soup",))
    for position, place in ((2, "delicious"), (4, "soup"), (0, "[CLS]"), (-1, ""), (99, "")):
        made = reading(explanation(("delicious soup",), target=np.array([[position, 0]])))
        assert made.place() == place
        assert (f" at <b>{place}</b>?" in fragment(made)) == bool(place)
    assert reading(one).place() == ""


def test_a_console_shows_the_weightiest_words() -> None:
    attributions = np.zeros_like(explanation().attributions)
    attributions[0, 1], attributions[0, 2] = 2.0, -1.0
    made = repr(reading(explanation(attributions=attributions)))
    assert made.startswith("Reading(POSITIVE: The +2.00, soup \u22121.00, ")
    assert len(made) < 100


def test_a_frame_has_a_line_per_target_and_word() -> None:
    pandas = pytest.importorskip("pandas")
    made = reading(explanation(labels=("A", "B")))
    frame = made.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.shape == (2 * len(made.words()), 6)
    assert frame[frame.target == "B"].attribution.tolist() == [word.attribution for word in made.words(1)]


# -- HTML -----------------------------------------------------------------------------------------


class Parsed(HTMLParser):
    """Tags with their attributes, and the text inside paragraphs of the class `text`."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.all_text = ""
        self._open: list[str] = []
        self._in_text = False
        self.feed(document)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)
        if tag == "p" and ("class", "text") in attrs:
            self._in_text = True
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self._in_text = self._in_text and tag != "p"

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.all_text += data
        if self._in_text and "rt" not in self._open:
            self.texts[-1] += data

    def having(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


HARMLESS = {
    "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "section", "p", "b", "dl", "div",
    "dt", "dd", "mark", "ruby", "rt", "span", "i", "table", "caption", "tbody", "tr", "th", "td", "details",
    "summary", "footer",
}  # fmt: skip
HARMLESS_ATTRIBUTES = {
    "lang", "charset", "name", "content", "http-equiv", "class", "style", "title", "aria-label",
    "aria-hidden", "role", "dir", "scope",
}  # fmt: skip


def assert_harmless(document: str) -> None:
    for tag, attributes in Parsed(document).tags:
        assert tag in HARMLESS
        assert attributes.keys() <= HARMLESS_ATTRIBUTES
        style = attributes.get("style") or ""
        assert re.fullmatch(r"(background|width|margin-left|rgba|[-a-z:;.,()\d% ])*", style), style


def hostile(text: str) -> Explanation:
    one = explanation((text,), (text,))
    said: dict[str, Any] = {"tokens": (text,) * len(one.tokens), "method": text, "baseline": text}
    return explanation((text,), (text,), target=np.array([[1, 0]]), **said)


def test_what_clients_and_models_say_is_text() -> None:
    for made in (page([reading(hostile(HOSTILE))], title=HOSTILE), fragment(reading(hostile(HOSTILE)))):
        assert_harmless(made)
        assert Parsed(made).texts == [HOSTILE]
        assert f"Why {HOSTILE}" in Parsed(made).all_text


def test_numbers_of_a_server_that_are_none() -> None:
    record = json.loads(json_of(explanation()))
    assert_harmless(page([Reading.of({**record, "evaluations": HOSTILE})]))


@given(st.text(max_size=30))
def test_the_text_is_shown_as_it_is(text: str) -> None:
    made = page([reading(hostile(text))], title=text)
    assert_harmless(made)
    assert Parsed(made).texts == [text]


def test_words_that_overlap_are_shown_once() -> None:
    one = explanation(("one two",), pieces=9)
    offsets = np.array([(-1, -1), (0, 5), (4, 7), (-1, -1)])
    made = Parsed(fragment(reading(explanation(("one two",), pieces=9, offsets=offsets))))
    assert len(one.tokens) == len(offsets)
    assert made.texts == ["one two"]


def test_a_pair_is_two_paragraphs() -> None:
    made = Parsed(fragment(reading(explanation(("Who was rude?", SENTENCE)))))
    assert made.texts == ["Who was rude?", SENTENCE]


def test_every_word_has_its_number_and_colours_are_not_alone() -> None:
    one = reading(explanation())
    made = Parsed(fragment(one))
    marks = made.having("mark")
    assert len(marks) == len(one.words())
    largest = max(abs(word.attribution) for word in one.words())
    for mark, word in zip(marks, one.words(), strict=True):
        title = str(mark["title"])
        assert title.startswith(f"{word.text}: ")
        number = float(title.rpartition(" ")[2].replace("\u2212", "-"))
        assert number == pytest.approx(word.attribution, abs=0.01)
        if abs(word.attribution) > 0.2 * largest:
            assert mark["class"] == ("for" if word.attribution > 0 else "against")
    assert len(made.having("tr")) == len(one.words())


def test_numbers_of_any_size_can_be_told_apart() -> None:
    for scale in (1e-4, 1.0, 1e4):
        one = explanation()
        made = fragment(reading(explanation(attributions=one.attributions * np.float32(scale))))
        numbers = re.findall(r"<rt>([^<]*)</rt>", made)
        assert len(set(numbers)) == len(numbers) > 3
        assert all(len(number) < 10 for number in numbers)


def test_a_warning_when_not_converged_and_only_then() -> None:
    assert "Not converged" not in page([reading(explanation())])
    made = page([reading(explanation(converged=np.array([False])))])
    assert "Not converged" in made
    assert "0.12" in made


def test_zeros_and_nothing_are_drawn_too() -> None:
    one = explanation()
    assert_harmless(page([reading(explanation(attributions=np.zeros_like(one.attributions)))]))
    nothing = page([reading(explanation(labels=()))])
    assert_harmless(nothing)
    assert SENTENCE in Parsed(nothing).all_text


def test_a_page_needs_nothing_else() -> None:
    made: Any = Parsed(page([reading(explanation())]))
    policy = [meta["content"] for meta in made.having("meta") if "http-equiv" in meta]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert made.having("html") == [{"lang": "en"}]


def test_a_notebook_shows_the_heat_map() -> None:
    one = reading(explanation())
    assert one._repr_html_() == fragment(one)
