"""Beam search: the most probable sequences of a student that writes them one id after the other.

Legend: B batch, S source length, T most ids written, V vocabulary, k beams.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from l2t_jax.data.subwords import BEGIN, END, PAD
from l2t_jax.types import Array, PyTree, Stepwise, Student


class _Search(NamedTuple):
    t: Array  # [] ids written
    live: Array  # [B, k] log-probabilities of what goes on
    ids: Array  # [B, k, T] of it
    newest: Array  # [B, k] the last of them
    cache: PyTree  # leaves [B k, ...]
    ended: Array  # [B, k] scores of what has ended; -inf: nothing yet
    ended_ids: Array  # [B, k, T]


def beam_search(
    student: Student,
    variables: dict[str, PyTree],
    source: Array,
    *,
    beam: int,
    steps: int,
    penalty: float = 1.0,
    most: Array | None = None,
) -> tuple[Array, Array]:
    """Search for y of the largest sum_t log p(y_t | y_<t, x) / |y|^a, END counted in |y|.

    In each step the 2 k best continuations of all beams are looked at. Those of them that end and are among the best k
    have ended; the best k of the others go on. A sentence is done when k have ended, or after the most ids it may have,
    the last of which is END. With one beam it is greedy.

    Args:
      student, variables: `stepwise`, where the student has it; else each step asks `apply` for the whole again.
      source: ids [B, S].
      beam: k.
      steps: T.
      penalty: a; 1 is the mean, 0 the sum.
      most: ids of each sentence [B], at most T, which it is by default.
    Returns:
      ids [B, T], PAD after END, and their scores [B].
    Source: the rule of fairseq's generator, which is of Sutskever et al. 2014 with lengths of Wu et al. 2016, a power.
    """
    if student.stepwise is None:
        student = student._replace(stepwise=_by_apply(student))
    assert student.stepwise is not None
    begin, step = student.stepwise
    batch, which = source.shape[0], jnp.arange(source.shape[0])[:, None]
    last = jnp.full(batch, steps) if most is None else most
    repeat = lambda tree: jax.tree.map(lambda x: jnp.repeat(x, beam, axis=0), tree)  # noqa: E731
    memory, cache = begin(variables, source, steps)
    memory, cache = repeat(memory), repeat(cache)

    def going_on(search: _Search) -> Array:
        return (search.t < steps) & ~jnp.all(_full(search.ended) | (search.t >= last))

    def advance(search: _Search) -> _Search:
        t = search.t
        logits, cache = step(variables, memory, search.cache, search.newest.ravel(), t)
        classes = logits.shape[-1]
        chances = jax.nn.log_softmax(logits).reshape(batch, beam, classes)
        kinds = jnp.arange(classes)
        over = (t >= last - 1)[:, None, None]
        allowed = (kinds != PAD) & (kinds != BEGIN) & (~over | (kinds == END))
        total = jnp.where(allowed, search.live[..., None] + chances, -jnp.inf)
        best, place = lax.top_k(total.reshape(batch, -1), min(2 * beam, beam * classes))  # [B, 2 k]
        parent, token = place // classes, (place % classes).astype(jnp.int32)
        written = search.ids[which, parent].at[:, :, t].set(token)
        ends = token == END
        good = ends & (jnp.arange(best.shape[1]) < beam) & ~_full(search.ended)[:, None]
        scores = jnp.where(good, best / (t + 1.0) ** penalty, -jnp.inf)
        ended, chosen = lax.top_k(jnp.concatenate([search.ended, scores], axis=1), beam)
        ended_ids = jnp.concatenate([search.ended_ids, written], axis=1)[which, chosen]
        live, chosen = lax.top_k(jnp.where(ends, -jnp.inf, best), beam)
        parent = parent[which, chosen]
        pick = lambda x: x.reshape(batch, beam, *x.shape[1:])[which, parent].reshape(x.shape)  # noqa: E731
        ids, newest = written[which, chosen], token[which, chosen]
        return _Search(t + 1, live, ids, newest, jax.tree.map(pick, cache), ended, ended_ids)

    dtype = jax.eval_shape(step, variables, memory, cache, jnp.zeros(batch * beam, jnp.int32), jnp.int32(0))[0].dtype
    nothing = jnp.full((batch, beam), -jnp.inf, dtype)
    blank = jnp.full((batch, beam, steps), PAD, jnp.int32)
    first = jnp.full((batch, beam), BEGIN, jnp.int32)
    start = _Search(jnp.int32(0), nothing.at[:, 0].set(0), blank, first, cache, nothing, blank)
    found = lax.while_loop(going_on, advance, start)
    return found.ended_ids[:, 0], found.ended[:, 0]  # top_k sorts


def _full(ended: Array) -> Array:
    return jnp.all(ended > -jnp.inf, axis=1)


def _by_apply(student: Student) -> Stepwise:
    """Each step reads the source and all that was written anew."""

    def begin(variables: dict[str, PyTree], source: Array, steps: int) -> tuple[PyTree, PyTree]:
        return source, jnp.full((source.shape[0], steps), PAD, jnp.int32)

    def step(
        variables: dict[str, PyTree], source: PyTree, written: PyTree, ids: Array, t: Array
    ) -> tuple[Array, PyTree]:
        written = lax.dynamic_update_slice_in_dim(written, ids[:, None], t, 1)
        inputs: PyTree = (source, written)
        logits, _ = student.apply(variables, inputs, False)
        return lax.dynamic_index_in_dim(logits, t, 1, keepdims=False), written

    return Stepwise(begin, step)
