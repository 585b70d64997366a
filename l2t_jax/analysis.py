"""Convergence analysis of L2T-DLN: alternating gradient descent at strict saddles, and curvature along a run.

Legend: D numbers of both blocks v = (v1, v2), D1 of the first; H Hessian; eta step size; T sweeps.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from l2t_jax.types import Array, Key, Loss, PyTree, Student, StudentState, Task
from l2t_jax.unroll import inner_objective, outer_objective, plain_gradient, student_step, unroll, unrolled_error

Objective = Callable[[PyTree, PyTree], Array]  # (v1, v2) -> [], twice differentiable
REAL = 1e-9  # relative imaginary part below which an eigenvalue counts as real


class Growth(NamedTuple):
    """How fast one sweep of alternating gradient descent grows near a point, and the bounds on it."""

    gamma: float  # minus the lowest eigenvalue of H; the point is a strict saddle where it is positive
    growth: float  # the largest real eigenvalue of M^-1 G
    sharp: float  # 1 + eta gamma, the bound of docs/convergence.md
    published: float  # 1 + eta gamma / (1 + C / C_max), Conclusion 1
    lipschitz: float  # C, the spectral norm of H
    block_lipschitz: float  # C_max, the largest spectral norm of a block of H


class Curvature(NamedTuple):
    """The lowest eigenvalue of a Hessian too large to write down, by Lanczos."""

    value: float
    direction: tuple[PyTree, PyTree]  # of unit norm, in the form of (v1, v2)
    first_share: float  # share of its squared norm that lies in v1
    residual: float  # |H x - value x|: the eigenvalue nearest to `value` is no farther than this
    products: int  # Hessian-vector products it took


class CurvatureError(ArithmeticError):
    """The lowest eigenvalue was not found."""


def hessian(objective: Objective, v1: PyTree, v2: PyTree) -> tuple[Array, int]:
    """H of a two-block objective at a point, and the size D1 of its first block.

    Args:
      objective: (v1, v2) -> [].
      v1, v2: the point, any pytrees of floats.
    Returns:
      H [D, D], D1.
    Source: L2T-DLN (NeurIPS 2023), Eq. 10; printed there as "grad_2 e", which is of the wrong dimension.
    """
    flat, unravel = ravel_pytree((v1, v2))
    return jax.hessian(lambda v: objective(*unravel(v)))(flat), ravel_pytree(v1)[0].size


def sweep_matrices(h: Array, first: int, eta: float) -> tuple[Array, Array]:
    """M = I + eta H_l and G = I - eta H_u, for which a sweep on v'Hv / 2 is v <- M^-1 G v.

    Args:
      h: H [D, D].
      first: D1, the size of the block that a sweep updates first.
      eta: step size of both blocks.
    Returns:
      M [D, D], G [D, D], with H_l = [[0, 0], [H21, 0]] and H_u = H - H_l.
    Raises:
      ValueError: H is no array or not square, or D1 leaves one of the blocks empty.
    Source: L2T-DLN (NeurIPS 2023), Eqs. 9-12.
    """
    if not hasattr(h, "ndim"):
        raise ValueError(f"H is a {type(h).__name__}: expected an array [D, D].")
    if h.ndim != 2 or h.shape[0] != h.shape[1] or not 0 < first < h.shape[0]:
        raise ValueError(f"H {list(h.shape)} cannot be divided after {first}: give [D, D] and 0 < D1 < D.")
    lower = jnp.zeros_like(h).at[first:, :first].set(h[first:, :first])
    identity = jnp.eye(h.shape[0], dtype=h.dtype)
    return identity + eta * lower, identity - eta * (h - lower)


def growth(h: Array, first: int, eta: float) -> Growth:
    """The largest real eigenvalue of M^-1 G, with Conclusion 1 and the sharper bound beside it.

    Where gamma > 0 it is at least 1 + eta gamma for any eta > 0, with equality where H12 = 0; the published bound is
    1 + eta gamma / (1 + C / C_max), which lies between a third and a half of that gain.

    Args:
      h: H [D, D], symmetric.
      first, eta: as for `sweep_matrices`.
    Returns:
      a `Growth`; at a point that is no strict saddle gamma is not positive and neither bound says anything.
    Raises:
      ValueError: as `sweep_matrices`, and where H is not symmetric.
    Source: L2T-DLN (NeurIPS 2023), Conclusion 1. C_max is not defined there; as in the source of its proof (Lu, Hong
    and Wang 2018) it is the largest of the blocks' own and mixed Lipschitz constants.
    """
    m, g = (np.asarray(x) for x in sweep_matrices(h, first, eta))
    matrix = np.asarray(h)
    if not np.allclose(matrix, matrix.T, rtol=1e-5, atol=1e-6 * np.abs(matrix).max(initial=0)):
        raise ValueError("H is not symmetric: give the Hessian of a twice differentiable objective.")
    eigenvalues = np.linalg.eigvals(np.linalg.solve(m, g))
    real = eigenvalues.real[np.abs(eigenvalues.imag) <= REAL * np.abs(eigenvalues).max()]
    blocks = matrix[:first, :first], matrix[first:, first:], matrix[:first, first:]
    whole, largest = np.linalg.norm(matrix, 2), max(np.linalg.norm(block, 2) for block in blocks)
    gamma = -np.linalg.eigvalsh(matrix)[0]
    return Growth(
        gamma=float(gamma),
        growth=float(real.max(initial=-np.inf)),
        sharp=float(1 + eta * gamma),
        published=float(1 + eta * gamma / (1 + whole / largest)),
        lipschitz=float(whole),
        block_lipschitz=float(largest),
    )


def alternating_descent(
    objective: Objective, v1: PyTree, v2: PyTree, eta: float, sweeps: int
) -> tuple[tuple[PyTree, PyTree], Array]:
    """T sweeps v1 <- v1 - eta d1 e(v1, v2), then v2 <- v2 - eta d2 e(v1, v2), the second at the new v1.

    Args:
      objective: (v1, v2) -> [].
      v1, v2: where it starts.
      eta: step size of both blocks.
      sweeps: T.
    Returns:
      all points, leaves [T + 1, ...], and the objective at them [T + 1].
    Source: L2T-DLN (NeurIPS 2023), Eq. 9. This is what the analysis is of; L2T-DLN itself is not it, since its student
    descends the DLN and not the validation error.
    """

    def sweep(v: tuple[PyTree, PyTree], _: None) -> tuple[tuple[PyTree, PyTree], tuple[PyTree, PyTree]]:
        first, second = v
        first = jax.tree.map(lambda x, d: x - eta * d, first, jax.grad(objective)(first, second))
        second = jax.tree.map(lambda x, d: x - eta * d, second, jax.grad(objective, argnums=1)(first, second))
        return (first, second), (first, second)

    _, later = lax.scan(sweep, (v1, v2), length=sweeps)
    points = jax.tree.map(lambda start, rest: jnp.concatenate([jnp.asarray(start)[None], rest]), (v1, v2), later)
    return points, jax.vmap(objective)(*points)


def taught_error(
    student: Student,
    task: Task,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: StudentState,
    batches: PyTree,
    validation: PyTree,
) -> Objective:
    """The two-block objective of a run: the validation error after N student steps, of student and loss parameters.

    e(theta, phi) = e_val(theta^N), theta^0 = theta, N steps under L_phi on batches that are held fixed.

    Args:
      student, task, loss, optimizer: as the run has them.
      state: of the student, for its batch statistics and optimizer state, which are held fixed too.
      batches: leaves [N, B, ...].
      validation: leaves [V, ...].
    Returns:
      objective(theta, phi) -> [].
    """
    step = student_step(plain_gradient(inner_objective(student, task, loss)), optimizer)
    error = unrolled_error(partial(unroll, step), outer_objective(student, task))
    return lambda theta, phi: error(phi, state._replace(params=theta), batches, validation)[0]


def lowest_curvature(
    objective: Objective, v1: PyTree, v2: PyTree, key: Key, *, tolerance: float = 1e-3, products: int = 2000
) -> Curvature:
    """The most negative curvature of an objective at a point: the lowest eigenvalue of H by Lanczos, H never formed.

    Args:
      objective: (v1, v2) -> [], twice differentiable; compiled once for all products with H.
      v1, v2: the point.
      key: of the random vector that Lanczos starts from.
      tolerance: of the eigenvalue, relative.
      products: at most about so many products with H.
    Returns:
      a `Curvature`; `residual` says how good it is, whatever the tolerance asked for.
    Raises:
      CurvatureError: not found within `products`, or a product was not finite.
    Source: implicitly restarted Lanczos (ARPACK); the product H x is the derivative of the gradient along x.
    """
    flat, unravel = ravel_pytree((v1, v2))
    count = 0

    @jax.jit
    def product(x: Array) -> Array:
        return jax.jvp(jax.grad(lambda v: objective(*unravel(v))), (flat,), (x,))[1]

    def matvec(x: Any) -> np.ndarray:
        nonlocal count
        count += 1
        result = np.asarray(product(jnp.asarray(x, flat.dtype).reshape(-1)))
        if not np.isfinite(result).all():
            raise CurvatureError("A product with the Hessian is not finite: the objective is not smooth there.")
        return result

    size = flat.size
    if size < 3:
        raise ValueError(f"Lanczos needs at least 3 numbers in both blocks together; there are {size}: use `hessian`.")
    operator = LinearOperator((size, size), matvec=matvec, dtype=flat.dtype)
    start = np.asarray(jax.random.normal(key, (size,), flat.dtype))
    kept = min(size, 20)
    try:
        values, vectors = eigsh(
            operator, k=1, which="SA", v0=start, tol=tolerance, ncv=kept, maxiter=max(1, products // kept)
        )
    except ArpackNoConvergence as error:
        raise CurvatureError(
            f"The lowest eigenvalue was not found to {tolerance:g} in {count} products with the Hessian: raise "
            "products or tolerance."
        ) from error
    x = vectors[:, 0]
    residual = float(np.linalg.norm(matvec(x) - values[0] * x))
    direction = unravel(jnp.asarray(x))
    share = float(np.sum(x[: ravel_pytree(v1)[0].size] ** 2))
    return Curvature(float(values[0]), direction, share, residual, count)
