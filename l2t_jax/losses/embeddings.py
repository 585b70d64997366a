"""Losses of distances between the embeddings of a batch: every pair and every triplet of it, fixed and parametrised.

Legend: R rows, the embeddings of a batch; D their dimension; d distances; E elements of phi; a anchor, p positive (of
the anchor's class, not itself), n negative (of another class).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from l2t_jax.inputs import known
from l2t_jax.losses.common import check_weights, hide, no_parameters, weigh
from l2t_jax.types import Array, Key, Loss, PyTree, Read

READS = "embeddings"  # the view of a task: outputs [R, D] on the unit sphere, targets the classes [R]
SHORTEST = 1e-3  # distances below are taken as this one: a root has no derivative at 0
CUTOFF, FARTHEST = 0.5, 1.4  # of the distance-weighted sampler: smaller distances count as CUTOFF, larger are not drawn
SHARPNESS = (2.0, 20.0)  # of the focal weighting at phi = 0: of positives, of negatives


class Pairs(NamedTuple):
    """All ordered pairs of a batch."""

    distances: Array  # [R, R]
    same: Array  # [R, R] 1 where the second is a positive of the first, else 0
    other: Array  # [R, R] 1 where it is a negative
    dimension: int  # D

    @property
    def anchors(self) -> Array:
        """[R] 1 for those with a positive and a negative: the others form no triplet."""
        return self.same.max(1) * self.other.max(1)


def pairs_of(embeddings: Array, classes: Array, mask: Array | None = None) -> Pairs:
    """The pairs of embeddings [R, D] of classes [R]; what a mask [R] hides is in none.

    Raises:
      ValueError: they are not embeddings and classes.
    """
    if jnp.ndim(embeddings) != 2 or jnp.shape(classes) != jnp.shape(embeddings)[:1]:
        raise ValueError(
            f"outputs are {list(jnp.shape(embeddings))} and targets {list(jnp.shape(classes))}: a loss of distances "
            "expects embeddings [B, D] and a class for each, [B]."
        )
    distances = optax.safe_norm(embeddings[:, None] - embeddings[None], SHORTEST, axis=-1)
    alike = classes[:, None] == classes[None]
    there = ~jnp.eye(len(classes), dtype=bool)
    if mask is not None:
        there = there & mask[:, None] & mask[None]
    kind = embeddings.dtype
    return Pairs(distances, (alike & there).astype(kind), (~alike & there).astype(kind), embeddings.shape[1])


def embeddings(outputs: Array, classes: Array) -> Read:
    """The view of a student of embeddings: outputs [B, D] on the unit sphere; an anchor without triplet weighs 0.

    Raises:
      ValueError: see `pairs_of`.
    """
    pairs = pairs_of(outputs, classes)
    return Read(on_sphere(outputs), classes, lax.stop_gradient(pairs.anchors))


def on_sphere(outputs: Array) -> Array:
    """Outputs [..., D] over their norm; 0 stays 0, with a derivative of 0."""
    return outputs / optax.safe_norm(outputs, 1e-6, axis=-1, keepdims=True)


def of_pairs(
    losses_of: Callable[[PyTree, Pairs], Array], init: Callable[[Key], PyTree] = no_parameters, **fields: Any
) -> Loss:
    """Make a `Loss` of a function of all pairs of a batch: (params, pairs) -> a value for each anchor [R].

    A masked example is in no pair, neither as an anchor nor as a positive or negative of one.
    """

    def apply(
        params: PyTree,
        outputs: Array,
        targets: Array,
        *,
        sample_weight: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        check_weights(outputs, sample_weight, mask)
        values = losses_of(params, pairs_of(*hide(outputs, targets, mask), mask))
        return weigh(values, sample_weight, mask)

    return Loss(init, apply, reads=READS, **fields)


# Negatives


def distance_weights(pairs: Pairs) -> Array:
    """The distance-weighted sampler: the probability [R, R] with which each negative of an anchor is drawn.

    q(n | a) ~ 1 / (d^(D-2) (1 - d^2/4)^((D-3)/2)), the inverse of the density of distances on the sphere, at
    d = max(d_an, 0.5); 0 beyond 1.4, where the margin loss is 0. An anchor without such a negative draws none (zeros).

    Source: Wu et al. 2017, section 4. Their code subtracts the maximum over the whole batch, so that rows underflow and
    are drawn from evenly, own class included; here each row is normalised by itself.
    """
    d = jnp.clip(pairs.distances, CUTOFF, FARTHEST)
    log = (2.0 - pairs.dimension) * jnp.log(d) - (pairs.dimension - 3) / 2 * jnp.log1p(-(d**2) / 4)
    drawn = (pairs.other > 0) & (pairs.distances < FARTHEST)
    masked = jnp.where(drawn, log, -jnp.inf)
    top = lax.stop_gradient(jnp.max(masked, axis=1, keepdims=True))  # which changes nothing, and has no derivative
    chance = jnp.exp(masked - jnp.where(jnp.isfinite(top), top, 0))
    return chance / jnp.maximum(chance.sum(1, keepdims=True), 1)


def draw_negatives(key: Key, pairs: Pairs) -> Array:
    """Draw a negative of each anchor [R] by `distance_weights`; R where it has none that could be drawn."""
    chance = distance_weights(pairs)
    drawn = jax.random.categorical(key, jnp.log(chance), axis=1)
    return jnp.where(chance.sum(1) > 0, drawn, len(chance))


def _evenly(pairs: Pairs) -> Array:
    return pairs.other / jnp.maximum(pairs.other.sum(1, keepdims=True), 1)


NEGATIVES: dict[str, Callable[[Pairs], Array]] = {"distance": distance_weights, "all": _evenly}
SEMIHARD = "semihard"  # of triplets alone: d_ap < d_an < d_ap + margin


def _triplets(pairs: Pairs, negatives: str, margin: float) -> Array:
    """How much each triplet [R, R, R] counts."""
    if negatives != SEMIHARD:
        of_anchor = pairs.other if negatives == "all" else NEGATIVES[negatives](pairs)
        return pairs.same[:, :, None] * of_anchor[:, None, :]
    gap = pairs.distances[:, None, :] - pairs.distances[:, :, None]  # d_an - d_ap
    between = ((gap > 0) & (gap < margin)).astype(gap.dtype)
    return pairs.same[:, :, None] * pairs.other[:, None, :] * between


@jax.custom_vjp
def _product(a: Array, b: Array) -> Array:
    """a * b, which can be differentiated in reverse alone."""
    return a * b


_product.defvjp(lambda a, b: (a * b, (a, b)), lambda both, slope: (slope * both[1], slope * both[0]))


@jax.custom_vjp
def _expected(chances: Array, values: Array) -> Array:
    """chances * values, whose derivative is that of values alone: what is drawn is given, however it was likely.

    The derivative itself depends on the chances, so that a hypergradient is exact: it sees that another student draws
    otherwise. It is no derivative of a function, so only reverse over reverse is right, and `_product` refuses others.
    """
    return chances * values


_expected.defvjp(
    lambda chances, values: (chances * values, chances),
    lambda chances, slope: (jnp.zeros_like(chances), _product(chances, slope)),
)


def _mean_of(pairs: Pairs, weights: Array, values: Array, negatives: str) -> Array:
    """Values [R] of which the mean over the anchors is that of values [R, k] which are not 0, by weights [R, k]."""
    count = (weights * (values > 0)).sum()
    shares = weights * (lax.stop_gradient(pairs.anchors.sum()) / jnp.where(count > 0, count, 1))
    return (_expected(shares, values) if negatives == "distance" else shares * values).sum(1)


def _triplet_values(pairs: Pairs, moved: Array, margin: float, negatives: str) -> Array:
    hinge = jax.nn.relu(moved[:, :, None] - moved[:, None, :] + margin)
    flat = lambda x: x.reshape(len(x), -1)  # noqa: E731
    return _mean_of(pairs, flat(_triplets(pairs, negatives, margin)), flat(hinge), negatives)


def _margin_values(pairs: Pairs, moved: Array, beta: Array | float, margin: float, negatives: str) -> Array:
    near, far = jax.nn.relu(margin + moved - beta), jax.nn.relu(margin - moved + beta)
    # A negative is drawn for each positive.
    weights = pairs.same.sum(1, keepdims=True) * NEGATIVES[negatives](pairs)
    return _mean_of(pairs, jnp.concatenate([pairs.same, weights], 1), jnp.concatenate([near, far], 1), negatives)


def _check(margin: float, negatives: str, *names: str) -> None:
    if not 0 < margin < 2:
        raise ValueError(f"margin={margin} must lie between 0 and 2, the diameter of the sphere.")
    known(f"negatives {negatives!r}", negatives, names)


# Fixed losses


def triplet(*, margin: float = 0.2, negatives: str = SEMIHARD) -> Loss:
    """Build the triplet loss, max(0, d_ap - d_an + margin), its mean over the triplets of a batch that are not 0.

    Args:
      margin: distance by which negatives should be farther.
      negatives: semihard, those with d_ap < d_an < d_ap + margin; all; or distance, each weighted by the probability
        with which the distance-weighted sampler draws it.
    Raises:
      ValueError: a knob is out of range.
    Source: Schroff et al. 2015 (FaceNet), of distances and not their squares, as on ALA's slides. All semi-hard
    triplets of a batch, and not one a pair, are ours: a small batch has few.
    """
    _check(margin, negatives, SEMIHARD, *NEGATIVES)
    return of_pairs(lambda params, pairs: _triplet_values(pairs, pairs.distances, margin, negatives), learned="no")


def margin(*, margin: float = 0.2, beta: float = 1.2, negatives: str = "distance") -> Loss:
    """Build the margin loss: max(0, margin + d_ap - beta) and max(0, margin - d_an + beta), beta learned beside.

    Mean over the pairs that are not 0; as many negatives of an anchor as it has positives. In place of drawing them we
    take the expectation over the draw, of the sum and of the count.

    Args:
      margin: distance on either side of the boundary.
      beta: the boundary at the start; it is then trained beside the student, by the same optimizer, one for all.
      negatives: distance, by the probability with which the distance-weighted sampler draws each; or all, evenly.
    Raises:
      ValueError: a knob is out of range.
    Source: Wu et al. 2017. Theirs has a beta for each class, with a rate of its own; nu, which holds it, is 0 there
    too.
    """
    _check(margin, negatives, *NEGATIVES)
    return of_pairs(
        lambda params, pairs: _margin_values(pairs, pairs.distances, params["beta"], margin, negatives),
        lambda key: {"beta": jnp.array(float(beta))},
        learned="student",
    )


def nca(*, temperature: float = 1 / 9) -> Loss:
    """Build neighbourhood components analysis, - log sum_p exp(-d_ap^2 / T) / sum_{j != a} exp(-d_aj^2 / T).

    Args:
      temperature: T; the smaller, the more only the nearest count.
    Raises:
      ValueError: it is not positive.
    Source: Goldberger et al. 2004, on the sphere; the temperature is that of ProxyNCA++ (Teh et al. 2020).
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive.")
    return of_pairs(lambda params, pairs: nca_values(pairs, temperature), learned="no")


def nca_values(pairs: Pairs, temperature: float = 1 / 9) -> Array:
    """The NCA loss of each anchor [R], 0 for one without triplet: a smooth form of not being right at recall@1."""
    logits = -(pairs.distances**2) / temperature
    whole = jnp.where(pairs.same + pairs.other > 0, logits, -1e9)
    right = jnp.where(pairs.same > 0, logits, -1e9)
    values = jax.nn.logsumexp(whole, axis=1) - jax.nn.logsumexp(right, axis=1)
    return jnp.where(pairs.anchors > 0, values, 0)


# Parametrised losses: those of ALA


# Increasing in d; all have the slope 1 at d = 1, so that equal phi change F there equally.
TRANSFORMS: dict[str, Callable[[Array], Array]] = {
    "d": lambda d: d,
    "d^2": lambda d: d**2 / 2,
    "log(1+d)": lambda d: 2 * jnp.log1p(d),
    "exp(d)": lambda d: jnp.exp(d - 1),
    "sqrt(d)": lambda d: 2 * jnp.sqrt(d),
}


def transforms(d: Array) -> Array:
    """Every transform of distances [...]: [E, ...]."""
    return jnp.stack([transform(d) for transform in TRANSFORMS.values()])


def mixed(phi: Array, d: Array) -> Array:
    """F(d) = sum_k phi_k T_k(d), for distances [...] and weights phi [E]."""
    return jnp.tensordot(phi.astype(d.dtype), transforms(d), 1)


def _only_d(key: Key) -> Array:
    return jnp.zeros(len(TRANSFORMS)).at[0].set(1.0)


def triplet_mixture(*, margin: float = 0.2, negatives: str = SEMIHARD) -> Loss:
    """Build ALA's distance mixture in the triplet loss: max(0, F(d_ap) - F(d_an) + margin), F = sum_k phi_k T_k.

    It begins with phi one-hot on d, as the triplet loss; which triplets count is a matter of d and not of F.

    Args: as in `triplet`.
    Raises:
      ValueError: a knob is out of range.
    Source: ALA (ICML 2019), the triplet form; its transforms are not known to us, `TRANSFORMS` are ours. A weight may
    be negative, so both signs of a transform are there.
    """
    _check(margin, negatives, SEMIHARD, *NEGATIVES)
    return of_pairs(
        lambda params, pairs: _triplet_values(pairs, mixed(params["phi"], pairs.distances), margin, negatives),
        lambda key: {"phi": _only_d(key)},
        reverse_only=negatives == "distance",
    )


def margin_mixture(*, margin: float = 0.2, beta: float = 1.2, negatives: str = "distance") -> Loss:
    """Build ALA's distance mixture in the margin loss: F(d) in place of d. It begins as the margin loss.

    Args:
      margin, negatives: as in `margin`.
      beta: likewise, but fixed: a hinge has no hypergradient of it, and a larger F does what a smaller one would.
    Raises:
      ValueError: a knob is out of range.
    Source: ALA (ICML 2019), margin and mixture; see `triplet_mixture`.
    """
    _check(margin, negatives, *NEGATIVES)
    return of_pairs(
        lambda params, pairs: _margin_values(pairs, mixed(params["phi"], pairs.distances), beta, margin, negatives),
        lambda key: {"phi": _only_d(key)},
        reverse_only=negatives == "distance",
    )


def focal_triplet(*, boundary: float = 1.0) -> Loss:
    """Build ALA's focal weighting, of each anchor with sums over its positives and its negatives:

      1/Phi_1 log(1 + sum_p exp(Phi_1 (d_ap - alpha))) + 1/Phi_2 log(1 + sum_n exp(-Phi_2 (d_an - alpha)))

    Phi_k = s_k exp(phi_k), so that it stays positive; s = 2 and 20.

    Args:
      boundary: alpha.
    Raises:
      ValueError: it is not on the sphere.
    Source: ALA (ICML 2019), slides. Where Phi begins is not stated there; s is ours, near the sharpness that the same
    form has in the multi-similarity loss (Wang et al. 2019).
    """
    if not 0 < boundary < 2:
        raise ValueError(f"boundary={boundary} must lie between 0 and 2, the diameter of the sphere.")

    def losses_of(params: PyTree, pairs: Pairs) -> Array:
        d, values = pairs.distances, jnp.zeros(len(pairs.distances), pairs.distances.dtype)
        for sign, k, there in ((1, 0, pairs.same), (-1, 1, pairs.other)):
            sharp = (SHARPNESS[k] * jnp.exp(params["phi"][k])).astype(d.dtype)
            powers = jnp.where(there > 0, sign * sharp * (d - boundary), -1e9)
            whole = jnp.concatenate([jnp.zeros_like(powers[:, :1]), powers], axis=1)  # the 1 of log(1 + ...)
            values = values + jax.nn.logsumexp(whole, axis=1) / sharp
        return jnp.where(pairs.anchors > 0, values, 0)

    return of_pairs(losses_of, lambda key: {"phi": jnp.zeros(2)})


def _of_mixture(pairs: Pairs) -> Array:
    moved = transforms(pairs.distances)
    return jnp.stack([_mean(moved, pairs.same), _mean(moved, pairs.other)], -1)


def _of_focal(pairs: Pairs) -> Array:
    near, far = _mean(pairs.distances, pairs.same), _mean(pairs.distances, pairs.other)
    return jnp.array([[near, far], [far, near]])


def _mean(values: Array, there: Array) -> Array:
    return (values * there).sum((-2, -1)) / jnp.maximum(there.sum(), 1)


class Signals(NamedTuple):
    """What ALA's controller is told of each element of phi, and between which bounds it moves them."""

    # -> [E, 2]: of a transform its means over positives and over negatives; of a sharpness the mean distance of its own
    # kind of pairs and that of the other
    of: Callable[[Pairs], Array]
    low: float
    high: float = 1.0


# A mixture stays increasing: a policy that knows nothing yet would else turn it around, and the student with it.
SIGNALS: dict[str, Signals] = {
    "triplet_mixture": Signals(_of_mixture, 0.0),
    "margin_mixture": Signals(_of_mixture, 0.0),
    "focal_triplet": Signals(_of_focal, -1.0),
}
