"""Where vocabularies come from: OpenAI's published file, a transformers directory, or the captions at hand."""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from sightline.errors import UserError, printable
from sightline.schema import require
from sightline.texts.byte_pairs import BYTES, END, START, WORD_END, Vocabulary, clean, usual_order, words

_PUBLISHED = "bpe_simple_vocab_16e6.txt.gz"
PUBLISHED_SIZE = 49_408
"""Tokens of OpenAI's vocabulary."""

_MERGES = PUBLISHED_SIZE - 2 * len(BYTES) - 2
_LARGEST = 64 * 2**20  # bytes of a vocabulary file, unpacked
_MOST_TOKENS = 2**20
_MOST_WORDS = 2**13  # the commonest words, from which a vocabulary is learned


def published() -> Vocabulary | None:
    """OpenAI's vocabulary of 49,408 tokens, out of the package open_clip; None where that is not installed."""
    package = find_spec("open_clip")
    for folder in (package.submodule_search_locations or ()) if package is not None else ():
        if (path := Path(folder) / _PUBLISHED).is_file():
            return read_merges(path)
    return None


def in_folder(folder: Path) -> bool:
    """Whether a folder holds what `read_folder` reads."""
    whole = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return whole or (folder / "tokenizer.json").is_file()


def read_vocabulary(path: str | Path) -> Vocabulary:
    """A vocabulary by its file or folder: OpenAI's `.txt.gz` of merges, or `vocab.json` and `merges.txt`.

    Raises UserError for what cannot be read, and for what is no vocabulary.
    """
    path = Path(path)
    return read_folder(path) if path.is_dir() else read_merges(path)


def read_merges(path: Path) -> Vocabulary:
    """OpenAI's form: a line for each merge under a first line of its own, packed or not; the ids follow from them."""
    lines = _text(path).split("\n")[1:]
    merges = _pairs([line for line in lines if line.strip()][:_MERGES], path)
    order = usual_order()
    tokens = [*order, *(byte + WORD_END for byte in order), *(a + b for a, b in merges), START, END]
    return _checked(lambda: Vocabulary(tuple(tokens), merges), path)


def read_folder(folder: Path, cleaning: Any = "transformers") -> Vocabulary:
    """`vocab.json` and `merges.txt`, as transformers writes them, or `tokenizer.json` where those are missing."""
    if not (folder / "vocab.json").is_file() and (folder / "tokenizer.json").is_file():
        where = folder / "tokenizer.json"
        model: Any = _json(where).get("model")
        require(isinstance(model, dict), f"{printable(where)} has no 'model'")
        lines = model.get("merges")
        require(isinstance(lines, list), f"{printable(where)} has no list of merges")
        return _numbered(model.get("vocab"), _pairs(lines, where), cleaning, where)
    where = folder / "merges.txt"
    lines = [line for line in _text(where).split("\n") if line.strip() and not line.startswith("#version")]
    return _numbered(_json(folder / "vocab.json"), _pairs(lines, where), cleaning, folder / "vocab.json")


def load_vocabulary(folder: Path | None, size: int) -> Vocabulary | None:
    """The vocabulary in a folder or, where there is none and OpenAI's has this size, that one; None without either.

    Raises UserError where the one in the folder has another size.
    """
    if folder is None or not in_folder(folder):
        return published() if size == PUBLISHED_SIZE else None
    vocabulary = read_folder(folder)
    fits = f"the vocabulary of {printable(folder)} has {len(vocabulary)} tokens, and the network reads {size}"
    require(len(vocabulary) == size, fits)
    return vocabulary


def folder_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    """The files from which transformers' `CLIPTokenizer` reads a vocabulary, by name."""
    marks = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    merges = "\n".join(["#version: 0.2", *(f"{first} {second}" for first, second in vocabulary.merges)])
    return {
        "vocab.json": json.dumps(dict(vocabulary.ids), ensure_ascii=False).encode(),
        "merges.txt": f"{merges}\n".encode(),
        "tokenizer_config.json": json.dumps({"tokenizer_class": "CLIPTokenizer", **marks}, indent=2).encode(),
    }


def learned(texts: Iterable[str], size: int = 2**10) -> Vocabulary:
    """A small vocabulary of its own for some texts: the commonest pairs are merged until there are `size` tokens.

    Pairs of equal count are merged in order of their names, so that it follows from the texts alone. Raises UserError
    for a size that leaves no room beyond the bytes and both marks.
    """
    least = 2 * len(BYTES) + 2
    require(least <= size <= _MOST_TOKENS, f"a vocabulary has {least} to {_MOST_TOKENS} tokens, not {size}")
    counts = Counter(word for text in texts for word in words(clean(text, "transformers")))
    counts = Counter(dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:_MOST_WORDS]))
    spelled = {word: _spelled(word) for word in counts}
    merges: list[tuple[str, str]] = []
    order = usual_order()
    tokens = [*order, *(byte + WORD_END for byte in order)]
    known = set(tokens)
    while len(tokens) + 2 < size:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in spelled.items():
            for pair in pairwise(symbols):
                pairs[pair] += counts[word]
        pairs = Counter({pair: n for pair, n in pairs.items() if pair[0] + pair[1] not in known})
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        merges.append(best)
        tokens.append(best[0] + best[1])
        known.add(tokens[-1])
        spelled = {word: _joined(symbols, best) for word, symbols in spelled.items()}
    return Vocabulary((*tokens, START, END), tuple(merges), "transformers")


def _spelled(word: str) -> list[str]:
    symbols = [BYTES[byte] for byte in word.encode("utf-8", errors="replace")]
    return [*symbols[:-1], symbols[-1] + WORD_END]


def _joined(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    found: list[str] = []
    i = 0
    while i < len(symbols):
        together = tuple(symbols[i : i + 2]) == pair
        found.append("".join(pair) if together else symbols[i])
        i += 2 if together else 1
    return found


def to_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The JSON object that `from_json` reads back to an equal vocabulary."""
    return {
        "cleaning": vocabulary.cleaning,
        "tokens": list(vocabulary.tokens),
        "merges": [" ".join(pair) for pair in vocabulary.merges],
    }


def from_json(data: Any, where: str) -> Vocabulary:
    """Reads what `to_json` wrote. Raises UserError that names `where`."""
    whole = isinstance(data, dict) and {"cleaning", "tokens", "merges"} <= data.keys()
    require(whole, f"{where} is not a vocabulary")
    tokens, cleaning = data["tokens"], data["cleaning"]
    texts = isinstance(tokens, list) and len(tokens) <= _MOST_TOKENS and all(isinstance(t, str) for t in tokens)
    require(texts and cleaning in ("openai", "transformers"), f"{where} is not a vocabulary")
    require(isinstance(data["merges"], list), f"{where} is not a vocabulary")
    return _checked(lambda: Vocabulary(tuple(tokens), _pairs(data["merges"], where), cleaning), where)


def _numbered(ids: Any, merges: tuple[tuple[str, str], ...], cleaning: Any, where: Path) -> Vocabulary:
    """A vocabulary from the ids of its tokens, which have to be 0, 1, 2 and so on."""
    sound = isinstance(ids, dict) and all(type(i) is int for i in ids.values())
    require(sound, f"{printable(where)} is not a table of tokens and their numbers")
    require(sorted(ids.values()) == list(range(len(ids))), f"{printable(where)}: the ids are not 0, 1, 2 and so on")
    return _checked(lambda: Vocabulary(tuple(sorted(ids, key=ids.get)), merges, cleaning), where)


def _pairs(lines: Iterable[Any], where: Any) -> tuple[tuple[str, str], ...]:
    found = []
    for line in lines:
        pair = line.split() if isinstance(line, str) else line
        whole = isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) and part for part in pair)
        require(whole, f"{printable(where)}: '{printable(line)}' is not a merge of two tokens")
        found.append((pair[0], pair[1]))
    return tuple(found)


def _checked(make: Any, where: Any) -> Vocabulary:
    try:
        return make()
    except UserError as fault:
        raise UserError(f"{printable(where)}: {fault}") from fault


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        require(len(data) <= _LARGEST, f"{printable(path)} is larger than any vocabulary ({_LARGEST >> 20} MiB)")
        return data.decode("utf-8").replace("\r\n", "\n")
    except UserError:
        raise
    except UnicodeDecodeError as fault:
        raise UserError(f"{printable(path)} is not a vocabulary: it is not UTF-8") from fault
    except (OSError, EOFError, zlib.error) as fault:
        reason = getattr(fault, "strerror", None) or printable(fault)
        raise UserError(f"cannot read the vocabulary {printable(path)}: {reason}") from fault


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError) as fault:
        if isinstance(fault, UserError):
            raise
        raise UserError(f"{printable(path)} is damaged: {printable(fault)}") from fault
    require(isinstance(found, dict), f"{printable(path)} is not a JSON object")
    return found
