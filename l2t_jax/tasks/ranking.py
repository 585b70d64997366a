"""Ranking: each class against all others, scored by the area under precision and recall, which rare classes decide.

Legend: B batch, V validation batch, C classes.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from l2t_jax.data import Dataset
from l2t_jax.losses.common import check_classes
from l2t_jax.losses.ranking import READS
from l2t_jax.tasks import own
from l2t_jax.tasks.classification import CLASSIFICATION, classification
from l2t_jax.tasks.spec import TaskSpec
from l2t_jax.types import Array, Batch, Metric, PyTree, Read, Student, Task, rows


def ranking(dataset: Dataset, *, axis_name: str | None = None) -> Task:
    """Build the task of a data set: that of `classification`, but for what a student is judged by.

    AUCPR is the average precision of a class's score among all examples, averaged over the classes that occur; AUCROC
    likewise. On a validation batch AUCPR is that of the batch, which is no mean over examples: each of them has it.
    The error of the hypergradient stays cross entropy, since a precision has no derivative.

    Args:
      dataset: of `classification`.
      axis_name: mapped axis over which batches are divided, if any: whole batches are ranked.
    Returns:
      a task with the view "batch" beside "rows" and "head", unless examples have weights.
    Source: ALA (ICML 2019), which rewards its policy by AUCPR and compares with Eban et al. 2017; the mean over classes
    is ours.
    """
    plain = classification(dataset)

    def metrics(outputs: Array, targets: Array) -> dict[str, Array]:
        found = whole(outputs, targets, axis_name)
        precision = average_precision(found.outputs, found.targets)
        return {**plain.metrics(outputs, targets), METRIC.name: jnp.full(len(targets), precision)}

    def measure(student: Student, variables: dict[str, PyTree], batch: Batch) -> PyTree:
        outputs, _ = student.apply(variables, batch.inputs, False)
        return {"score": outputs, "class": batch.targets}

    # Pairs of examples have no weights.
    pairs = () if "weight" in dataset.train else ((READS, partial(whole, axis_name=axis_name)),)
    views = (("rows", rows), ("head", rows), *pairs)
    return plain._replace(metrics=metrics, views=views, measure=measure, score=_score, metric=METRIC)


METRIC = Metric("AUCPR", "%")


def whole(outputs: Array, targets: Array, axis_name: str | None = None) -> Read:
    """The view "batch": the rows of the whole batch, on each device that has a part of it."""
    check_classes(outputs, targets)
    if axis_name is not None:
        outputs, targets = (lax.all_gather(x, axis_name, tiled=True) for x in (outputs, targets))
    return Read(outputs, targets)


def average_precision(outputs: Array, targets: Array) -> Array:
    """The mean over the classes that occur of the mean, over a class's rows, of the precision at the row's score.

    Args:
      outputs: [R, C]; targets: [R].
    Returns:
      [] in [0, 1]. Equal scores are taken together, as scikit-learn does.
    """
    of_class = jax.nn.one_hot(targets, outputs.shape[-1], dtype=outputs.dtype)  # [R, C]
    before = (outputs[None] >= outputs[:, None]).astype(outputs.dtype)  # [R, R, C]: j is not behind i
    precision = jnp.einsum("ijc,jc->ic", before, of_class, precision=lax.Precision.HIGHEST) / before.sum(1)
    counts = of_class.sum(0)
    each = jnp.sum(of_class * precision, axis=0) / jnp.maximum(counts, 1)
    return jnp.sum(each) / jnp.sum(counts > 0)


def _score(measured: PyTree) -> dict[str, float]:
    """AUCPR, AUCROC and accuracy of a whole set, and the AUCPR of each class."""
    from sklearn.metrics import average_precision_score, roc_auc_score  # slow to import

    scores, classes = np.asarray(measured["score"], np.float64), np.asarray(measured["class"])
    if not np.isfinite(scores).all():  # of a student that stopped early
        return {name: float("nan") for name in (METRIC.name, "AUCROC", "accuracy")}
    precisions, areas = {}, []
    for c in np.unique(classes):
        precisions[f"AUCPR of {c}"] = float(average_precision_score(classes == c, scores[:, c]))
        if not (classes == c).all():
            areas.append(roc_auc_score(classes == c, scores[:, c]))
    return {
        METRIC.name: float(np.mean(list(precisions.values()))),
        "AUCROC": float(np.mean(areas)) if areas else float("nan"),
        "accuracy": float(np.mean(scores.argmax(1) == classes)),
        **precisions,
    }


RANKING: TaskSpec = dataclasses.replace(CLASSIFICATION, build=ranking, open=own.open_path)
