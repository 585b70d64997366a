"""Aligned text: files whose lines are translations of each other, prepared TFDS sets, a language made here.

Legend: n pairs of sentences.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from l2t_jax.data.order import require_counts
from l2t_jax.data.sets import DataError, require
from l2t_jax.data.tfds import read_tfds

TRAIN, TEST = ("train",), ("test", "valid", "val", "validation", "dev")  # names of files, the first that is there
_CONTINUED = "@@ "  # how subword-nmt marks a word that goes on


class Pairs(NamedTuple):
    """Sentences and their translations. Leaves "source" and "target": arrays of bytes [n], UTF-8."""

    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    languages: tuple[str, str]  # of source and target


def read_pairs(folder: Path) -> Pairs:
    """Two aligned text files a split: train.de, train.en, test.de, test.en, as fairseq's preparation of IWSLT14 leaves.

    Args:
      folder: holds them. The languages are the endings of the files called train; the source is the first in the
        folder's name, where that ends with both (iwslt14.tokenized.de-en), else the first in the alphabet. Where there
        is no test, the first of valid, val, validation and dev takes its place; otherwise those are not read.
    Returns:
      all sentences, subwords marked by "@@ " joined to words.
    Raises:
      DataError: a file is missing, not UTF-8, or has an empty line, or two files have not the same number of lines.
    """
    require(folder.is_dir(), f"{folder} is no folder: give one with two aligned text files a split, e.g. train.de.")
    endings = sorted(path.suffix[1:] for path in folder.glob("train.?*") if path.is_file())
    if len(endings) != 2:
        found = ", ".join(f"train.{ending}" for ending in endings) or "no file called train"
        raise DataError(f"{folder} has {found}: expected two, one of each language, e.g. train.de and train.en.")
    if re.search(rf"(^|\W){re.escape(endings[1])}-{re.escape(endings[0])}$", folder.name):
        endings.reverse()
    languages = endings[0], endings[1]
    train, test = (_part(folder, names, languages) for names in (TRAIN, TEST))
    return Pairs(train, test, languages)


def _part(folder: Path, names: Sequence[str], languages: tuple[str, str]) -> dict[str, np.ndarray]:
    there = [name for name in names if any((folder / f"{name}.{language}").is_file() for language in languages)]
    require(bool(there), f"{folder} has no {names[0]}.{languages[0]} and {names[0]}.{languages[1]}: put them there.")
    paths = [folder / f"{there[0]}.{language}" for language in languages]
    source, target = (_lines(path) for path in paths)
    require(
        len(source) == len(target),
        f"{paths[0]} has {len(source)} lines and {paths[1]} {len(target)}: line i of one must be the translation of "
        "line i of the other.",
    )
    return {"source": _objects(source), "target": _objects(target)}


def _lines(path: Path) -> list[str]:
    require(path.is_file(), f"{path} is not there: each split needs a file of each language.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (at byte {error.start}): convert it, e.g. with iconv.") from error
    lines = [line.replace(_CONTINUED, "").strip() for line in text.split("\n")]
    lines = lines[:-1] if lines and not lines[-1] else lines  # what follows the last line's end
    require(bool(lines), f"{path} holds no line.")
    empty = [i for i, line in enumerate(lines) if not line]
    if empty:
        raise DataError(
            f"{path}, line {empty[0] + 1} is empty ({len(empty)} such): leave out that line in both languages."
        )
    return lines


def _objects(texts: Sequence[str]) -> np.ndarray:
    found = np.empty(len(texts), object)
    found[:] = [text.encode() for text in texts]
    return found


def read_pairs_tfds(data_dir: Path, download: bool, name: str, languages: tuple[str, str]) -> Pairs:
    """Sentences of a prepared TFDS set whose features are two languages.

    Args:
      data_dir, download, name: as of `read_tfds`.
      languages: the features, source first.
    Raises:
      DataError: the data are missing or unreadable, have no such features, or a sentence is empty.
    """

    def stack(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        texts = {
            key: [record[lang] for record in records] for key, lang in zip(("source", "target"), languages, strict=True)
        }
        return {key: _objects([text.decode().strip() for text in of]) for key, of in texts.items()}

    train, test = read_tfds(data_dir, download, name, ("train", "test"), stack)
    for part, examples in (("train", train), ("test", test)):
        for key, language in zip(("source", "target"), languages, strict=True):
            empty = [i for i, text in enumerate(examples[key]) if not text]
            require(not empty, f"{name} {part}: the {language} of pair {empty[:1]} is empty ({len(empty)} such).")
    return Pairs(train, test, languages)


# A language pair that is made here: words are translated one by one, adjectives follow their noun, the verb is last.

_THINGS = {
    **{"tir": "hund", "bak": "katze", "lem": "vogel", "sat": "baum"},
    **{"nop": "haus", "kid": "stein", "rul": "fisch", "mev": "kind"},
}
_QUALITIES = {"gor": "gross", "pli": "klein", "zun": "rot", "fex": "blau", "tash": "alt", "wim": "neu"}
_ACTIONS = {"drav": "sieht", "hest": "sucht", "kiln": "findet", "jamo": "liebt", "vurs": "traegt"}
_MARKS = {"ta": "der", "un": "ein"}
MADE = ("made", "up")


def made_pairs(n_train: int = 2000, n_test: int = 200, seed: int = 0) -> Pairs:
    """Sentences of a made-up language, and their translations by a rule that can be learned.

    "ta gor tir drav un bak" is "der hund gross ein katze sieht": each word has one translation, an adjective follows
    its noun, the verb comes last. No test sentence is trained on.

    Args:
      n_train: pairs to train on.
      n_test: pairs to test on.
      seed: equal seeds make equal sets.
    Raises:
      DataError: a number is no integer, or no pair would be there.
    """
    require_counts(DataError, n_train=(n_train, 1), n_test=(n_test, 1), seed=(seed, 0))
    random = np.random.default_rng((seed, 2))
    pick = lambda words: list(words)[random.integers(len(words))]  # noqa: E731

    def thing() -> tuple[list[str], list[str]]:
        mark, noun = pick(("ta", "un")), pick(_THINGS)
        qualities = [pick(_QUALITIES) for _ in range(random.integers(0, 3))]
        told = [_MARKS[mark], _THINGS[noun], *(_QUALITIES[q] for q in qualities)]
        return [mark, *qualities, noun], told

    pairs: dict[str, str] = {}
    while len(pairs) < n_train + n_test:
        (subject, told), (seen, told_seen), verb = thing(), thing(), pick(_ACTIONS)
        pairs[" ".join([*subject, verb, *seen])] = " ".join([*told, *told_seen, _ACTIONS[verb]])
    sources, targets = _objects(list(pairs)), _objects(list(pairs.values()))
    parts = (slice(n_train), slice(n_train, None))
    train, test = ({"source": sources[part], "target": targets[part]} for part in parts)
    return Pairs(train, test, MADE)
