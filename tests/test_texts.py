"""Byte pairs: the same ids as OpenAI's and transformers' tokenizers give, and small vocabularies of one's own."""

import json
import random
import unicodedata
from dataclasses import replace
from pathlib import Path

import ftfy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTokenizer

from sightline.errors import UserError
from sightline.texts.byte_pairs import BYTES, END, START, Vocabulary, clean, words
from sightline.texts.prompts import prompts
from sightline.texts.vocabularies import (
    folder_files,
    from_json,
    learned,
    published,
    read_folder,
    read_merges,
    to_json,
)

SPANS = [
    *[(0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x600, 0x700), (0x900, 0x980), (0x2000, 0x2100)],
    *[(0x2150, 0x2190), (0x3040, 0x3100), (0x4E00, 0x4F00), (0xAC00, 0xAD00), (0xE000, 0xE010), (0xFF00, 0xFFF0)],
    *[
        (0x0, 0x40),
        (0x1D400, 0x1D800),
        (0x1F300, 0x1F700),
        (0x31350, 0x31400),
        (0x11F00, 0x11F60),
        (0x10FFF0, 0x110000),
    ],
]
ODD = [
    *("", "   ", "'", "''s", "it's", "IT'S", "don't'll", "a" * 500, "😀" * 90, "\x1c\x1d\x85\u2028", "<|endoftext|>"),
    *("<|ENDOFTEXT|>", "x<|endoftext|>y", "a<|startoftext|> b", "ΣΑΣ Σ", "İI", "e\u0301é", "ﬁ ﷺ", "\u0130\u03a3"),
    *("\ufeffbom", "a\u200db", "🏳️‍🌈 flag", "1234567890", "٣٤ Ⅻ ½ ²", "&amp;&lt;br&gt;", "http://x.y/z?q=1", "\0\0"),
]
WORDS = [
    *("a", "photo", "of", "the", "red", "circle", "cat", "it's", "don't", "we're", "antidisestablishmentarianism"),
    *("2024", "café", "naïve", "Straße", "x_y"),
]


def texts(count: int) -> list[str]:
    """Words, runs of one alphabet, and mixtures of all."""
    draw = random.Random(0)
    found = list(ODD)
    while len(found) < count:
        kind = draw.random()
        if kind < 0.25:
            found.append(" ".join(draw.choices(WORDS, k=draw.randint(1, 12))))
            continue
        spans = [draw.choice(SPANS)] if kind < 0.7 else SPANS
        found.append("".join(chr(draw.randrange(*draw.choice(spans))) for _ in range(draw.randint(1, 30))))
    return found


@pytest.fixture(scope="module")
def openai() -> Vocabulary:
    vocabulary = published()
    assert vocabulary is not None
    return vocabulary


def test_the_published_vocabulary_is_numbered_as_it_should_be(openai: Vocabulary) -> None:
    assert (len(openai), openai.start, openai.end) == (49_408, 49_406, 49_407)
    assert openai("a photo of a cat", 8).tolist() == [[49_406, 320, 1125, 539, 320, 2368, 49_407, 0]]


def test_ids_are_those_of_transformers(openai: Vocabulary, tmp_path: Path) -> None:
    for name, content in folder_files(openai).items():
        (tmp_path / name).write_bytes(content)
    theirs = CLIPTokenizer.from_pretrained(str(tmp_path))
    ours = read_folder(tmp_path)
    assert ours == replace(openai, cleaning="transformers")
    sample = texts(5_000)
    expected = [row[1:-1] for row in theirs(sample)["input_ids"]]
    assert [text for text, ids in zip(sample, expected, strict=True) if ours.encode(text) != ids] == []


def test_ids_are_those_of_open_clip_where_nothing_is_mended_first(openai: Vocabulary) -> None:
    theirs = SimpleTokenizer()
    # Its regular expressions know later versions of Unicode, and take U+0345 for the letter that is its capital.
    later = [text for text in texts(1_500) if not any(unicodedata.category(c) == "Cn" or c == "\u0345" for c in text)]
    sample = [text for text in later if ftfy.fix_text(text) == text and "<|" not in text and text.strip()]
    assert len(sample) > 500
    assert [text for text in sample if openai.encode(text) != theirs.encode(text)] == []
    assert openai(["a cat", "word " * 100], 77).tolist() == theirs(["a cat", "word " * 100]).tolist()


@given(st.text(max_size=60).filter(lambda text: START not in text and END not in text))
def test_texts_come_back_from_their_ids_but_for_space_and_capitals(text: str) -> None:
    vocabulary = learned(["a red circle", "a blue square"], 530)
    back = vocabulary.decode(vocabulary.encode(text))
    expected = "".join(words(clean(text, "transformers")))
    assert "".join(back.split()) == "".join(expected.split())


def test_a_long_word_takes_no_square_of_its_length(openai: Vocabulary) -> None:
    assert openai.decode(openai.encode("ab" * 50_000)) == "ab" * 50_000


def test_merges_by_hand() -> None:
    base = learned([], 514)
    assert len(base) == 514
    pairs = (("l", "o"), ("o", "w</w>"), ("lo", "w</w>"))
    tokens = (*base.tokens[:512], "lo", "ow</w>", "low</w>", START, END)
    vocabulary = Vocabulary(tokens, pairs)
    assert vocabulary.encode("low") == [tokens.index("low</w>")]
    assert vocabulary.encode("lows") == [tokens.index(t) for t in ("lo", "w", "s</w>")]
    assert vocabulary.encode("ow low") == [tokens.index("ow</w>"), tokens.index("low</w>")]
    assert vocabulary(["low", ""], 4).tolist() == [[515, 514, 516, 0], [515, 516, 0, 0]]


def test_words_are_split_as_published() -> None:
    assert list(words("it's 42 x-ray!! o'clock")) == ["it", "'s", "4", "2", "x", "-", "ray", "!!", "o", "'", "clock"]


def test_learned_from_captions_the_commonest_pairs_come_first() -> None:
    vocabulary = learned(["hug hug hug hug hug hugs", "pug pug"], 517)
    assert vocabulary.merges[0] == ("u", "g</w>")  # 7 times; "hu" 6 times
    assert vocabulary.merges[1] == ("h", "ug</w>")
    assert learned(["hug hug hug hug hug hugs", "pug pug"], 517) == vocabulary
    assert len(learned(["ab"], 2_000)) == 514  # no pair twice


def test_a_text_that_is_too_long_is_cut_and_ends(openai: Vocabulary) -> None:
    row = openai("word " * 100, 7)[0].tolist()
    assert (row[0], row[-1], len(row)) == (openai.start, openai.end, 7)


def test_vocabularies_survive_their_files(openai: Vocabulary, tmp_path: Path) -> None:
    own = learned(["a red circle and a blue square"] * 3, 540)
    assert from_json(json.loads(json.dumps(to_json(own))), "x") == own
    merges = tmp_path / "merges.txt"
    merges.write_text("\n".join(["version", *(" ".join(pair) for pair in own.merges)]))
    assert read_merges(merges).merges == own.merges


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("merges.txt", b"\xff\xfe\xff", "not UTF-8"),
        ("merges.txt", b"v\na b c", "not a merge of two"),
        ("vocab.json", b"[1]", "not a JSON object"),
        ("vocab.json", b'{"a": 0}', "lacks the token"),
        ("vocab.json", b'{"a": 7}', "not 0, 1, 2"),
        ("vocab.json", b"{" * 9_000, "damaged"),
        ("merges.txt", b"\x1f\x8b\x08broken", "cannot read"),
    ],
)
def test_damaged_vocabularies_are_refused(tmp_path: Path, name: str, content: bytes, fault: str) -> None:
    for file, good in folder_files(learned(["a b"], 514)).items():
        (tmp_path / file).write_bytes(content if file == name else good)
    with pytest.raises(UserError, match=fault) as refusal:
        read_folder(tmp_path)
    assert name in str(refusal.value)


def test_prompts() -> None:
    assert prompts(["cat", "dog"], ["a {}", "the {}!"]) == (["a cat", "the cat!", "a dog", "the dog!"], [0, 0, 1, 1])
    for labels, templates, fault in [
        ([], ["{}"], "labels"),
        (["a"], [], "labels"),
        (["a"], ["photo"], "no {}"),
        (["a", " "], ["{}"], "empty"),
        (["a", "b", "a"], ["{}"], "twice"),
    ]:
        with pytest.raises(UserError, match=fault):
            prompts(labels, templates)


def test_every_byte_has_its_own_character() -> None:
    assert len(set(BYTES)) == 256
    assert all(character.isprintable() and not character.isspace() for character in BYTES)
