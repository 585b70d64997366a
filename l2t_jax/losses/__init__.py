"""Training losses by name. A new loss is one pure function in one file and one line here."""

import inspect
from collections.abc import Callable
from typing import Any

from l2t_jax.inputs import known
from l2t_jax.losses.adaptive_robust import adaptive_robust
from l2t_jax.losses.bilinear import bilinear, bilinear_low_rank
from l2t_jax.losses.checking import LossError, check_loss
from l2t_jax.losses.common import check_classes, fixed, make_loss
from l2t_jax.losses.cross_entropy import cross_entropy
from l2t_jax.losses.dln import dln
from l2t_jax.losses.embeddings import focal_triplet, margin, margin_mixture, nca, triplet, triplet_mixture
from l2t_jax.losses.generalized_cross_entropy import generalized_cross_entropy
from l2t_jax.losses.label_smoothing import label_smoothing
from l2t_jax.losses.labelled_class import focal, mae, poly, sce, taylor_ce
from l2t_jax.losses.large_margin_softmax import large_margin_softmax
from l2t_jax.losses.ml3 import ml3
from l2t_jax.losses.ranking import READS as BATCH
from l2t_jax.losses.ranking import aucpr, pairwise_aucroc
from l2t_jax.losses.smooth_zero_one import smooth_zero_one
from l2t_jax.losses.taylor_glo import taylor_glo
from l2t_jax.losses.terms import linear_dln, sum_of_terms
from l2t_jax.losses.weight_net import weight_net
from l2t_jax.types import Loss

LOSSES: dict[str, Callable[..., Loss]] = {
    "cross_entropy": fixed(cross_entropy),
    "label_smoothing": fixed(label_smoothing),
    "generalized_cross_entropy": fixed(generalized_cross_entropy),
    "focal": fixed(focal),
    "mae": fixed(mae),
    "sce": fixed(sce),
    "poly": fixed(poly),
    "taylor_ce": fixed(taylor_ce),
    "smooth_zero_one": smooth_zero_one,
    "large_margin_softmax": large_margin_softmax,
    "adaptive_robust": adaptive_robust,
    "aucpr": aucpr,
    "pairwise_aucroc": fixed(pairwise_aucroc, reads=BATCH),
    "dln": dln,
    "bilinear": bilinear,
    "bilinear_low_rank": bilinear_low_rank,
    "ml3": ml3,
    "taylor_glo": taylor_glo,
    "weight_net": weight_net,
    "linear_dln": linear_dln,
    "sum_of_terms": sum_of_terms,
    "triplet": triplet,
    "margin": margin,
    "nca": nca,
    "triplet_mixture": triplet_mixture,
    "margin_mixture": margin_mixture,
    "focal_triplet": focal_triplet,
}


def build_loss(name: str, num_classes: int, **knobs: Any) -> Loss:
    """Build a loss by name; one with parameters for each class says so by a keyword `num_classes` and is given C.

    Args:
      name: one of `LOSSES`.
      num_classes: C.
      **knobs: of the builder.
    Raises:
      ValueError: an unknown name, a knob that this loss has not, or a value that is out of range.
    """
    known(f"loss {name!r}", name, LOSSES)
    needs_classes = "num_classes" in inspect.signature(LOSSES[name]).parameters
    arguments = ({"num_classes": num_classes} if needs_classes else {}) | knobs
    try:
        inspect.signature(LOSSES[name]).bind(**arguments)
    except TypeError as error:  # Python's own line of an unknown keyword
        raise ValueError(f"loss {name!r} with {knobs}: {error}. See the arguments of its builder.") from error
    return LOSSES[name](**arguments)


def fixed_losses() -> list[str]:
    """Names of the losses that need no teacher: those a student can be trained with as they are."""
    return [name for name, build in LOSSES.items() if build().learned != "teacher"]


__all__ = ["LOSSES", "LossError", "build_loss", "check_classes", "check_loss", "fixed", "fixed_losses", "make_loss"]
