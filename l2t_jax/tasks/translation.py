"""Translation: cross entropy of the next subword as the outer error, BLEU of a beam search as the score.

Legend: B batch, S and T source and target length in subwords, V vocabulary, R = B T rows, n pairs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax.data import DataError, Dataset, at, require
from l2t_jax.data.subwords import BEGIN, END, PAD, Subwords, train_subwords
from l2t_jax.data.text import Pairs, made_pairs, read_pairs, read_pairs_tfds
from l2t_jax.losses.cross_entropy import cross_entropy
from l2t_jax.tasks.beam import beam_search
from l2t_jax.tasks.spec import TaskSpec, has
from l2t_jax.types import Array, Batch, Errors, Key, Lengths, Metric, PyTree, Read, Student, Task
from l2t_jax.unroll import each_example

ROOM = 1.5, 5  # a translation may have so many times the subwords of its source, and so many more


@dataclasses.dataclass(frozen=True, eq=False)
class Sentences:
    """What is known of pairs of sentences."""

    languages: tuple[str, str]  # of source and target
    vocabulary: int  # V that suits the set
    max_length: int  # of a side in training that suits the set, in subwords
    model: bytes = b""  # of the subwords, once the text is encoded
    # part -> what was left out -> how many
    counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)

    @property
    def files(self) -> dict[str, bytes]:
        """What is kept with a run: name -> content."""
        return {"subwords.model": self.model} if self.model else {}


def encode(dataset: Dataset, *, vocabulary: int = 0, max_length: int = 0, reverse: bool = False) -> Dataset:
    """Learn subwords from the training pairs, and turn sentences into ids.

    Args:
      dataset: {"source", "target"}: bytes, UTF-8; gives its `Sentences`.
      vocabulary: V, subwords of both languages together; 0: what suits the data set.
      max_length: subwords of a side, END among them; longer pairs are left out of training, and never of the
        test set; 0: what suits the data set.
      reverse: translate the other way.
    Returns:
      int32 {"source" [n, S], "target" [n, T]}, END after each and PAD after that; of the test set, sorted by the
      length of its sources, the texts too, "text" and "reference", uint8 padded with zeros.
    Raises:
      DataError: the training text has not so many subwords, or no pair is short enough.
      ValueError: a length that is none.
    """
    info: Sentences = dataset.info
    most = max_length or info.max_length
    if most < 2:
        raise ValueError(f"max_length={max_length}: a sentence has a subword and its end: give at least 2.")
    train, test = (_texts(part, reverse) for part in (dataset.train, dataset.test))
    try:
        model = train_subwords([*train["source"], *train["target"]], vocabulary or info.vocabulary)
    except DataError as error:
        raise DataError(f"--vocabulary={vocabulary or info.vocabulary}: {error}") from error
    subwords = Subwords(model)
    ids = {side: [[*found, END] for found in subwords.encode(texts)] for side, texts in train.items()}
    short = np.array([max(len(x), len(y)) <= most for x, y in zip(ids["source"], ids["target"], strict=True)])
    require(
        bool(short.any()),
        f"--max_length={most}: no training pair of {dataset.name} is so short: give a larger one, or more subwords.",
    )
    encoded = {
        **{side: _padded([[*found, END] for found in subwords.encode(texts)]) for side, texts in test.items()},
        "text": _as_bytes(test["source"]),
        "reference": _as_bytes(test["target"]),
    }
    # Those that are translated together are of like length, so that they end together.
    order = np.argsort((encoded["source"] != PAD).sum(1), kind="stable")
    encoded = at(encoded, order)
    whole = dataclasses.replace(dataset, train={side: _padded(of) for side, of in ids.items()}, test=encoded)
    kept = whole.take(short)
    # No longer than what is kept: padding costs time.
    kept = dataclasses.replace(kept, train={side: of[:, : (of != PAD).sum(1).max()] for side, of in kept.train.items()})
    counts = {"train": {f"pairs longer than {most} subwords left out": int(np.sum(~short))}}
    languages = info.languages[::-1] if reverse else info.languages
    return dataclasses.replace(
        kept, info=dataclasses.replace(info, languages=languages, model=model, counts={**info.counts, **counts})
    )


def _texts(part: PyTree, reverse: bool) -> dict[str, list[str]]:
    names = ("target", "source") if reverse else ("source", "target")
    return {to: [text.decode() for text in part[name]] for to, name in zip(("source", "target"), names, strict=True)}


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    found = np.full((len(rows), max(map(len, rows))), PAD, np.int32)
    for row, ids in zip(found, rows, strict=True):
        row[: len(ids)] = ids
    return found


def _as_bytes(texts: Sequence[str]) -> np.ndarray:
    return _padded([list(text.encode()) for text in texts]).astype(np.uint8)


def _as_text(row: np.ndarray) -> str:
    return np.asarray(row, np.uint8).tobytes().rstrip(b"\0").decode()


def translation(dataset: Dataset, *, beam: int = 5, length_penalty: float = 1.0, buckets: int = 1) -> Task:
    """Build the task of a set of encoded sentences.

    error = -log p(y_t | y_<t, x) of each subword of the target, its end among them. A student's loss is the mean of any
    loss of classes over the subwords of the batch. Padding counts nowhere.

    Args:
      dataset: of `encode`.
      beam: k, of the search that is scored.
      length_penalty: a; of the translations with scores log p(y | x) / |y|^a the best is taken.
      buckets: rounds in a row that share out their pairs by length, so that less is padding; each length that
        occurs, in steps of 8, is compiled for itself; 1: all batches have one shape.
    Raises:
      ValueError: a beam or buckets below 1, or a penalty that is no number.
    Source: L2T-DLF (NeurIPS 2018), 4.2, for the task; beam and penalty are those of fairseq's recipe for IWSLT14.
    """
    for name, count in (("beam", beam), ("buckets", buckets)):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name}={count!r} is not a positive integer: give at least 1.")
    if not np.isfinite(length_penalty):
        raise ValueError(f"length_penalty={length_penalty!r} is not a finite number: 1 compares means, 0 sums.")
    info: Sentences = dataset.info
    subwords = Subwords(info.model)
    sacrebleu_kinds()  # now, and not where a run ends

    def gather(data: PyTree, indices: Array, keys: Key | None) -> Batch:
        source, target = data["source"][indices], data["target"][indices]
        begin = jnp.full_like(target[..., :1], BEGIN)
        shifted = jnp.concatenate([begin, jnp.where(target == END, PAD, target)[..., :-1]], axis=-1)
        return Batch((source, shifted), target, true=data["reference"][indices] if "reference" in data else ())

    def measure(student: Student, variables: dict[str, PyTree], batch: Batch) -> PyTree:
        source, _ = batch.inputs
        outputs, _ = student.apply(variables, batch.inputs, False)
        counted = (batch.targets != PAD).astype(outputs.dtype)
        values = error(outputs, batch.targets).values.reshape(counted.shape)
        room = lambda length: (ROOM[0] * length).astype(int) + ROOM[1]  # noqa: E731
        search = partial(beam_search, beam=beam, steps=int(room(np.int64(source.shape[1]))), penalty=length_penalty)
        ids, _ = search(student, variables, source, most=room(jnp.sum(source != PAD, axis=1)))
        return {
            "ids": ids,
            "reference": batch.true,
            "subwords": counted.sum(1),
            "right": jnp.sum(counted * (outputs.argmax(-1) == batch.targets), axis=1),
            "error": jnp.sum(counted * values, axis=1),
        }

    return Task(
        error=error,
        metrics=_metrics,
        gather=gather,
        views=(("rows", tokens),),
        measure=measure,
        score=partial(_score, subwords),
        metric=Metric("BLEU"),
        outputs=subwords.size,
        lengths=Lengths(_lengths, _cut, buckets) if buckets > 1 else None,
        scored_at_once=50,
    )


def _lengths(examples: PyTree) -> np.ndarray:
    found: np.ndarray = np.maximum(*((examples[side] != PAD).sum(1) for side in ("source", "target")))
    return found


def _cut(examples: PyTree, length: int) -> PyTree:
    return {side: examples[side][:, :length] for side in ("source", "target")}


def tokens(outputs: Array, targets: Array) -> Read:
    """The view "rows": each subword of the target, its end among them; padding has weight 0.

    Args:
      outputs: logits [B, T, V].
      targets: ids [B, T].
    Returns:
      logits [R, V], ids [R], weights [R].
    Raises:
      ValueError: these are the outputs of another kind of student.
    """
    if not hasattr(outputs, "ndim") or outputs.ndim != 3 or outputs.shape[:2] != targets.shape:
        told = ", ".join(str(list(jnp.shape(x))) for x in jax.tree.leaves(outputs))
        raise ValueError(f"its students put out logits [B, T, V] of ids {list(targets.shape)}, and this one {told}.")
    counted = targets != PAD
    # What padding gives may be anything, NaN too, whose derivative would be NaN even of weight 0.
    logits = jnp.where(counted[..., None], outputs, 0)
    return Read(logits.reshape(-1, outputs.shape[-1]), targets.ravel(), counted.ravel().astype(outputs.dtype))


def error(outputs: Array, targets: Array) -> Errors:
    """-log p of each subword [R]; see `tokens`."""
    read = tokens(outputs, targets)
    return Errors(cross_entropy(read.outputs, read.targets), read.weight)


def _metrics(outputs: Array, targets: Array) -> dict[str, Array]:
    read = tokens(outputs, targets)
    right = (read.outputs.argmax(-1) == read.targets).astype(outputs.dtype)
    return {"token_accuracy": each_example(Errors(right, read.weight), len(targets))}


# Scoring


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU of a corpus, one reference each, by the names of sacrebleu's signatures; "BLEU" is the first.

    Mixed case with sacrebleu's own tokens (13a), and lower case with the text's, as papers on IWSLT14 report it.

    Source: Papineni et al. 2002; Post 2018 (sacrebleu) for signatures.
    """
    found: dict[str, float] = {}
    for kind in sacrebleu_kinds():
        score = kind.corpus_score(list(hypotheses), [list(references)]).score  # counted now, which the signature tells
        found[f"BLEU {kind.get_signature().format()}"] = float(score)
    return {"BLEU": next(iter(found.values())), **found}


def sacrebleu_kinds() -> tuple[Any, Any]:
    """The two scorers.

    Raises:
      ImportError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU  # only translation needs it
    except ImportError:
        raise ImportError("translation needs sacrebleu, which is not installed: pip install sacrebleu.") from None
    return BLEU(), BLEU(lowercase=True, tokenize="none", force=True)


def _score(subwords: Subwords, measured: PyTree) -> dict[str, float]:
    """BLEU, and of the true target's subwords, given those before, the share that is right and the cross entropy."""
    written = [subwords.decode(ids) for ids in np.asarray(measured["ids"])]
    references = [_as_text(row) for row in measured["reference"]]
    total = {name: float(np.sum(measured[name], dtype=np.float64)) for name in ("subwords", "right", "error")}
    return {
        **bleu(written, references),
        "token accuracy": total["right"] / total["subwords"],
        "cross entropy": total["error"] / total["subwords"],
    }


def in_words(
    info: Sentences, task: Task, student: Student, variables: dict[str, PyTree] | None, block: PyTree
) -> dict[str, list[str]]:
    """The translations that a student writes of examples, or without variables what they are."""
    if variables is None:
        return {
            name: [_as_text(row) for row in block[of]] for name, of in (("source", "text"), ("reference", "reference"))
        }
    assert task.measure is not None
    batch = task.gather(block, jnp.arange(len(block["source"])), None)
    measured = jax.jit(task.measure, static_argnums=0)(student, variables, batch)
    subwords = Subwords(info.model)
    return {"": [subwords.decode(ids) for ids in np.asarray(measured["ids"])]}


# Data


def _dataset(name: str, found: Pairs, vocabulary: int, max_length: int) -> Dataset:
    return Dataset(name, found.train, found.test, Sentences(found.languages, vocabulary, max_length))


def _made(data_dir: Path, download: bool) -> Dataset:
    return _dataset("made_up", made_pairs(), 150, 32)


def _tfds(name: str, languages: tuple[str, str], vocabulary: int) -> Callable[[Path, bool], Dataset]:
    return lambda data_dir, download: _dataset(
        name, read_pairs_tfds(data_dir, download, name, languages), vocabulary, 32
    )


def open_path(path: Path) -> Dataset:
    """A folder with two aligned text files a split.

    Raises:
      DataError: see `read_pairs`.
    """
    return _dataset(str(path), read_pairs(path), 10_000, 175)


TRANSLATION = TaskSpec(
    build=translation,
    encode=encode,
    datasets={"made_up": _made, "multi30k_de_en": _tfds("multi30k_de_en", ("de", "en"), 1000)},
    open=open_path,
    check=has(Sentences, "source", "target"),
    defaults={"dataset": "made_up", "student": "transformer_small"},
    student_knobs={"width": 64, "hidden": 128},
    settings={
        "unroll_length": 5,
        "batch_size": 16,
        "validation_batch_size": 32,
        "epochs": 2,
        "student_optimizer": "adam",
        "student_lr": 3e-3,
        "student_schedule": "inverse_sqrt",
    },
    in_words=in_words,
)
