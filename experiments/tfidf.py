"""Texts in a table as a data set of features: an .npz with the TF-IDF of the most frequent words.

  python -m experiments.tfidf --texts=train.csv --test_texts=test.csv --out=news.npz
  python -m experiments.tfidf --texts=train.csv --test_texts=test.csv --true_column=gt --known=1000 --out=news.npz
  python -m experiments.classification --dataset=news.npz --student=mlp

Words and their weights are learned from the training texts alone. Where --true_column names right labels, those of the
test set are right, and --known says how many training examples, as many of each class, are known to be so: they
measure the validation error, with their right labels, and the others are trained on.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from sklearn.feature_extraction.text import TfidfVectorizer

from experiments._command import reader, start
from l2t_jax.data import require
from l2t_jax.data.files import read_csv
from l2t_jax.data.noise import balanced
from l2t_jax.runs.config import UsageError

FLAGS = flags.FLAGS
flags.DEFINE_string("texts", None, "FILE.csv of training texts: a head, then a line for each.")
flags.DEFINE_string("test_texts", None, "FILE.csv of test texts, with the same columns.")
flags.DEFINE_string("text_column", "text", "Name of the column of texts.")
flags.DEFINE_string("label_column", "label", "Name of the column of labels.")
flags.DEFINE_string("true_column", None, "Name of the column of right labels, where some are wrong.")
flags.DEFINE_integer("known", 0, "Training examples that are known to be right, as many of each class.", lower_bound=0)
flags.DEFINE_integer("words", 2000, "Features: so many of the most frequent words.", lower_bound=1)
flags.DEFINE_string("out", None, "FILE.npz to write.")

SEED = 1  # of the draw of what is known


def read_columns(path: Path, columns: list[str]) -> list[list[str]]:
    """Columns of a table, by name.

    Raises:
      DataError: it cannot be read, or has no such column.
    """
    heads, rows = read_csv(path)
    for column in columns:
        require(column.lower() in heads, f"{path} has no column {column!r}, but {', '.join(heads)}.")
    return [[row[column.lower()] for row in rows] for column in columns]


def features_of(train: list[str], test: list[str], words: int) -> tuple[np.ndarray, np.ndarray]:
    """TF-IDF of the training texts' most frequent words that are no English stop words, [n, F] and [n', F] float32."""
    vectorizer = TfidfVectorizer(max_features=words, stop_words="english", sublinear_tf=True, dtype=np.float32)
    return vectorizer.fit_transform(train).toarray(), vectorizer.transform(test).toarray()


def write(out: Path) -> Iterator[str]:
    """Read the tables that the flags name, write the data set, say what is in it.

    Raises:
      UsageError: a flag is missing or has no meaning.
      DataError: a table cannot be read, or has too few examples of a class.
    """
    label, true = FLAGS.label_column, FLAGS.true_column or FLAGS.label_column
    train_text, given, right = read_columns(Path(FLAGS.texts), [FLAGS.text_column, label, true])
    test_text, test_labels = read_columns(Path(FLAGS.test_texts), [FLAGS.text_column, true])
    x, x_test = features_of(train_text, test_text, FLAGS.words)
    y, truth = np.array(given), np.array(right)
    arrays: dict[str, Any] = {"x": x, "y": y, "x_test": x_test, "y_test": np.array(test_labels)}
    if FLAGS.true_column is not None:
        arrays["true"] = truth
        yield f"{100 * np.mean(y != truth):.2f} % of {len(y)} labels are wrong"
    if FLAGS.known:
        names, places = np.unique(truth, return_inverse=True)
        order = np.random.default_rng(SEED).permutation(len(y))
        arrays["clean"] = order[balanced(places[order], FLAGS.known, len(names))]
        arrays["y"] = np.where(np.isin(np.arange(len(y)), arrays["clean"]), truth, y)
        yield f"{FLAGS.known} examples are known to be right"
    with out.open("wb") as file:
        np.savez_compressed(file, **arrays)
    yield f"{out}: {x.shape[0]} training and {x_test.shape[0]} test texts, {x.shape[1]} words"


def work() -> Iterator[str]:
    """As `write`, once the flags are looked at."""
    for name in ("texts", "test_texts", "out"):
        if FLAGS[name].value is None:
            raise UsageError(f"--{name} is not given: see python -m experiments.tfidf --help.")
    if FLAGS.known and FLAGS.true_column is None:
        raise UsageError("--known without --true_column: nothing says which labels are right.")
    if Path(FLAGS.out).suffix != ".npz":
        raise UsageError(f"--out={FLAGS.out}: give a name that ends in .npz.")
    return write(Path(FLAGS.out))


main = reader(work)

if __name__ == "__main__":
    start(main)
