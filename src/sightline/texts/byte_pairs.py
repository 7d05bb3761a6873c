"""Byte-pair encoding as CLIP's networks read it (arXiv 1508.07909, section 3.2; arXiv 2103.00020, section 2.4)."""

import heapq
import html
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from sightline.errors import printable
from sightline.schema import require

START, END = "<|startoftext|>", "<|endoftext|>"
"""The tokens that begin and end every text."""

WORD_END = "</w>"
"""What the last symbol of a word carries."""

_MARKS = re.compile(rf"({re.escape(START)}|{re.escape(END)})")
_ENDINGS = re.compile(r"'(?:s|t|re|ve|m|ll|d)")
_SPACE = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
_LONG_WORD = 64  # characters beyond which a word is not worth remembering


def _alphabet() -> tuple[str, ...]:
    """A printable character for every byte: itself where it is one, else the next ones beyond the 256th."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = iter(range(256, 512))
    return tuple(chr(byte) if byte in shown else chr(next(rest)) for byte in range(256))


BYTES = _alphabet()
"""The character that stands for each byte."""


def usual_order() -> list[str]:
    """The single-byte tokens in the order in which OpenAI's vocabulary numbers them: the printable bytes first."""
    return sorted(BYTES, key=lambda character: (ord(character) > 255, ord(character)))


@dataclass(frozen=True)
class Vocabulary:
    """Texts to token ids and back.

    `tokens` are all tokens by id; `merges` the pairs that become one, the most urgent first. `cleaning` is how a text
    is prepared: `openai` resolves HTML entities twice and strips, `transformers` composes characters (NFC); both turn
    any white space into one blank and capitals into small letters. What only one of them does is felt in odd texts
    alone. OpenAI's code also mends wrongly decoded text before, which neither transformers nor this does. Raises
    UserError for tokens that are not distinct, lack a byte, or lack what a merge makes.
    """

    tokens: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]
    cleaning: Literal["openai", "transformers"] = "openai"

    def __post_init__(self) -> None:
        require(len(self.ids) == len(self.tokens), "a vocabulary has a token twice")
        needed = [*BYTES, *(byte + WORD_END for byte in BYTES), START, END]
        missing = [token for token in needed if token not in self.ids]
        missing += [first + second for first, second in self.merges if first + second not in self.ids]
        require(not missing, f"a vocabulary lacks the token '{printable(next(iter(missing), ''))}'")
        require(len(self.ranks) == len(self.merges), "a vocabulary has a merge twice")

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """The id of each token."""
        return {token: i for i, token in enumerate(self.tokens)}

    @cached_property
    def ranks(self) -> Mapping[tuple[str, str], int]:
        """The place of each merge."""
        return {pair: rank for rank, pair in enumerate(self.merges)}

    @property
    def start(self) -> int:
        """The id that begins every text."""
        return self.ids[START]

    @property
    def end(self) -> int:
        """The id that ends every text."""
        return self.ids[END]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without those that begin and end it."""
        found: list[int] = []
        early = self.cleaning == "transformers"  # there a mark in the text is one before capitals become small letters
        for part in _MARKS.split(text if early else clean(text, self.cleaning)):
            if part in (START, END):
                found.append(self.ids[part])
                continue
            for word in words(clean(part, self.cleaning) if early else part):
                found += self._known(word) if len(word) <= _LONG_WORD else self._merged(word)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, a blank after each word, without those that begin and end it."""
        known = [self.tokens[i] for i in ids if 0 <= i < len(self.tokens) and i not in (self.start, self.end)]
        joined = "".join(known).replace(WORD_END, " ")
        values = bytes(_BYTE_OF[character] if character != " " else 32 for character in joined)
        return values.decode("utf-8", errors="replace").strip()

    def __call__(self, texts: str | Sequence[str], length: int = 77) -> Int[Tensor, "b length"]:
        """Texts as rows of `length` ids: the start, the text, its end, zeros.

        A text that is too long is cut, and ends like the others. Raises UserError for anything but texts, and for a
        length that leaves no room for one token.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        require(length > 2, f"a text of {length} tokens has no room between its start and its end")
        rows = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            require(isinstance(text, str), f"a text is expected, not {printable(repr(text), 60)}")
            inner = self.encode(text)[: length - 2]
            row[: len(inner) + 2] = torch.tensor([self.start, *inner, self.end])
        return rows

    @cached_property
    def _known(self):
        return lru_cache(maxsize=2**16)(self._merged)

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("tokens", "merges", "cleaning")}

    def __setstate__(self, state: Mapping[str, object]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)

    def _merged(self, word: str) -> list[int]:
        """A word's ids: its bytes, of which the most urgent pair, leftmost first, becomes one until none is left."""
        symbols = [BYTES[byte] for byte in word.encode("utf-8", errors="replace")]
        symbols[-1] += WORD_END
        after = [*range(1, len(symbols)), -1]
        before = [*range(-1, len(symbols) - 1)]
        pairs = pairwise(symbols)
        waiting = [(self.ranks[pair], i, *pair) for i, pair in enumerate(pairs) if pair in self.ranks]
        heapq.heapify(waiting)
        while waiting:
            _, i, first, second = heapq.heappop(waiting)
            j = after[i]
            if symbols[i] != first or j < 0 or symbols[j] != second:
                continue  # one of the two has become part of another symbol since
            symbols[i], symbols[j] = first + second, ""
            after[i] = after[j]
            if after[j] >= 0:
                before[after[j]] = i
            for left in (before[i], i):
                right = after[left] if left >= 0 else -1
                if left >= 0 and right >= 0 and (rank := self.ranks.get((symbols[left], symbols[right]))) is not None:
                    heapq.heappush(waiting, (rank, left, symbols[left], symbols[right]))
        return [self.ids[symbol] for symbol in symbols if symbol]


_BYTE_OF = {character: byte for byte, character in enumerate(BYTES)}


def clean(text: str, how: str) -> str:
    """A text with small letters and one blank for any white space, prepared as OpenAI or transformers does it."""
    if how == "openai":
        return " ".join(html.unescape(html.unescape(text)).split()).lower()
    composed = _SPACE.sub(" ", unicodedata.normalize("NFC", text))
    return "".join(character.lower() for character in composed)  # one by one: no sigma knows that it ends a word


def words(text: str) -> Iterator[str]:
    """The words of a text: runs of letters, single digits, runs of other signs, endings after an apostrophe."""
    i, count = 0, len(text)
    while i < count:
        if ending := _ENDINGS.match(text, i):
            yield ending[0]
            i = ending.end()
            continue
        kind, begin = _kind(text[i]), i
        i += 1
        while i < count and kind != "N" and _kind(text[i]) == kind:
            i += 1
        if kind != "Z":
            yield text[begin:i]


@lru_cache(maxsize=2**16)
def _kind(character: str) -> str:
    """L for a letter, N for a numeral, Z for white space, S for any other sign."""
    if _SPACE.match(character):
        return "Z"
    category = unicodedata.category(character)
    if category == "Cn":
        return next((kind for kind, spans in _SINCE.items() if _within(ord(character), spans)), "S")
    return category[0] if category[0] in "LN" else "S"


def _within(point: int, spans: Sequence[int]) -> bool:
    return any(first <= point <= last for first, last in zip(spans[::2], spans[1::2], strict=True))


_SINCE: Mapping[str, Sequence[int]] = {
    "L": (
        *(0x1C89, 0x1C8A, 0xA7CB, 0xA7CD, 0xA7DA, 0xA7DC, 0x105C0, 0x105F3, 0x10D4A, 0x10D65, 0x10D6F, 0x10D85),
        *(0x10EC2, 0x10EC4, 0x1123F, 0x11240, 0x11380, 0x11389, 0x1138B, 0x1138B, 0x1138E, 0x1138E, 0x11390, 0x113B5),
        *(0x113B7, 0x113B7, 0x113D1, 0x113D1, 0x113D3, 0x113D3, 0x11BC0, 0x11BE0, 0x11F02, 0x11F02, 0x11F04, 0x11F10),
        *(0x11F12, 0x11F33, 0x1342F, 0x1342F, 0x13441, 0x13446, 0x13460, 0x143FA, 0x16100, 0x1611D, 0x16D40, 0x16D6C),
        *(0x18CFF, 0x18CFF, 0x1B132, 0x1B132, 0x1B155, 0x1B155, 0x1DF25, 0x1DF2A, 0x1E030, 0x1E06D, 0x1E4D0, 0x1E4EB),
        *(0x1E5D0, 0x1E5ED, 0x1E5F0, 0x1E5F0, 0x2B739, 0x2B739, 0x2EBF0, 0x2EE5D, 0x31350, 0x323AF),
    ),
    "N": (
        *(0x10D40, 0x10D49, 0x116D0, 0x116E3, 0x11BF0, 0x11BF9, 0x11F50, 0x11F59, 0x16130, 0x16139, 0x16D70, 0x16D79),
        *(0x1CCF0, 0x1CCF9, 0x1D2C0, 0x1D2D3, 0x1E4F0, 0x1E4F9, 0x1E5F1, 0x1E5FA),
    ),
}
"""Letters and numerals of Unicode 15 and 16, first and last of each span, for Pythons that do not know them yet."""
