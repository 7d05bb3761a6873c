"""What holds for every text that comes from outside: it is shown safely and comes back whole."""

import csv
import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from io import StringIO
from typing import Any, Literal

from hypothesis import given
from hypothesis import strategies as st

from examples import JSON, altered, tried
from sightline.checkpoints.sealed import parse_json, sealed
from sightline.errors import printable, suggest
from sightline.explanation.page import document
from sightline.inference.files import to_json as predictions_json
from sightline.inference.files import write_csv
from sightline.inference.predictor import Answer
from sightline.schema import from_json, to_json
from sightline.types import Prediction, Score

TEXTS = st.text(max_size=30)
SAYABLE = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


@given(st.text(max_size=300), st.integers(1, 80))
def test_what_is_printed_has_no_controls_and_an_end(text, limit):
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit
    shown.encode()  # no lone surrogates
    if text.isprintable() and len(text) <= limit:
        assert shown == text


@given(TEXTS, st.lists(TEXTS, max_size=6))
def test_only_known_names_are_suggested(word, known):
    said = suggest(word, known)
    assert said == "" or any(name in said for name in known)
    assert suggest(word, []) == ""


@given(st.lists(st.tuples(SAYABLE, SAYABLE, st.floats(0, 1), st.none() | SAYABLE.filter(bool)), max_size=4))
def test_answers_come_back_from_csv_and_json(rows):
    answers = [
        Answer(path, None if error else Prediction([Score(label, 0, score)]), error)
        for path, label, score, error in rows
    ]
    stream = StringIO(newline="")
    assert list(write_csv(answers, stream)) == answers
    rows = list(csv.DictReader(StringIO(stream.getvalue(), newline=""), strict=True))
    assert [row["path"].removeprefix("./") for row in rows] == [a.path.removeprefix("./") for a in answers]
    for row, answer in zip(rows, answers, strict=True):  # what a spreadsheet would compute has an apostrophe before it
        for written, meant in (
            (row["error"], answer.error),
            (row["label"], answer.prediction and answer.prediction.label),
        ):
            assert written.replace("'", "") == (meant or "").replace("'", "")
            assert written[:1] in ((meant or "")[:1], "'")
    document = json.loads(json.dumps(predictions_json(answers, "m")))
    assert [result["path"] for result in document["results"]] == [a.path for a in answers]


class Seen(HTMLParser):
    """The tags of a page, and the text between them."""

    def __init__(self, content: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *attrs))

    def handle_data(self, data):
        self.text += data


@given(SAYABLE | SAYABLE.map(lambda text: f"</title><script>{text}</script>\"'&lt;"))
def test_a_title_stays_text(title):
    seen = Seen(document(title, ""))
    assert seen.tags == Seen(document("", "")).tags
    assert title.replace("\r\n", "\n").split() == seen.text.split()[: len(title.split())] or not title.isprintable()


# Documents with a seal


@given(st.dictionaries(TEXTS.filter(lambda name: name != "seal"), JSON, min_size=1, max_size=4), st.data())
def test_a_sealed_document_comes_back_and_tells_every_change(document, data):
    whole = sealed(document)
    plain = {key: value for key, value in parse_json(whole, "here").items() if key != "seal"}
    assert json.dumps(plain, sort_keys=True) == json.dumps(document, sort_keys=True)
    bent = bytearray(whole)
    bent[data.draw(st.integers(0, len(bent) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    found, refusal = tried(lambda: parse_json(bytes(bent), "here"))
    assert "here" in refusal or "seal" not in found  # and whoever asks for a seal notices


# The closed schema


@dataclass(frozen=True)
class Inner:
    size: tuple[int, int] = (1, 2)
    share: float | None = None
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = Inner()
    many: tuple[float, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    flag: bool = False
    anything: Any = None


WHOLE = to_json(Outer("x", Inner(share=0.5), (1.0, 2.0), {"a": 1}))


@given(JSON | altered(WHOLE))
def test_any_json_is_settings_or_refused_where_it_stands(data):
    found, refusal = tried(lambda: from_json(Outer, data, "here"))
    if refusal:
        assert refusal.startswith("here")
        return
    assert from_json(Outer, to_json(found), "here") == found or "nan" in repr(found)
    assert type(found.name) is str
    assert type(found.flag) is bool
    assert all(type(n) is int for n in (*found.inner.size, *found.counts.values()))
    assert all(type(n) is float for n in found.many)
