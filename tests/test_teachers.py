"""The coordinate-wise LSTM against numbers computed with the authors' class, and optax transformations as teachers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2t_jax import teachers
from l2t_jax.losses import build_loss
from l2t_jax.teachers import TEACHERS, from_optax, sum_of
from l2t_jax.teachers.coordinate_lstm import UNITS, Cell, coordinate_lstm, features_of

PHI = {"a": jnp.ones((3, 2)), "b": jnp.zeros(4)}


def anchor_cells():
    """W_ih[r, c] = .2 sin(l + r + .5 c), W_hh[r, c] = .2 cos(l + r - .5 c), b[r] = .1 sin(l + r); rows are gates."""
    cells = []
    for layer, (inputs, h) in enumerate(zip((2, *UNITS[:-1]), UNITS, strict=True), start=1):
        r = jnp.arange(4 * h)
        kernel = 0.2 * jnp.sin(layer + r[None, :] + 0.5 * jnp.arange(inputs)[:, None])
        recurrent = 0.2 * jnp.cos(layer + r[None, :] - 0.5 * jnp.arange(h)[:, None])
        cells.append(Cell(kernel, recurrent, 0.1 * jnp.sin(layer + r), jnp.zeros(4 * h)))
    return tuple(cells)


@pytest.mark.versions
def test_lstm_anchor(x64):
    teacher = coordinate_lstm(1.0)
    hidden = teacher.hidden(jnp.zeros(4))
    expected = [
        (-0.00667903, -0.00668151, -0.00668046, -0.00668049),
        (-0.01005439, -0.01006146, -0.01005849, -0.01005859),
        (-0.01176639, -0.01177888, -0.01177366, -0.01177389),
    ]
    for step, row in enumerate(expected):
        gradient = jnp.array([1e-2, -1e-3, 1e-6, 0.0]) * (step + 1)
        output, hidden = teacher.update(anchor_cells(), hidden, gradient, jnp.zeros(4))
        np.testing.assert_allclose(output, row, atol=6e-9)


@pytest.mark.parametrize(("preprocess", "count"), [(10.0, 84_236), (None, 83_980)])
def test_parameter_count(preprocess, count):
    params = coordinate_lstm(preprocess=preprocess).init(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    assert jnp.abs(params[0].input_kernel).max() <= 1 / 8 and jnp.abs(params[3].input_bias).max() <= 1


def test_preprocessing_anchors():
    features = features_of(jnp.array([1e-2, 1e-5, -1e-2, 0.0]), 10.0)
    expected = [[-0.460517, 1], [-1, 0.220265], [-0.460517, -1], [-1, 0]]
    np.testing.assert_allclose(features, expected, atol=1e-5)
    assert features_of(jnp.zeros(3), None).shape == (3, 1)


def test_update_scale_sign_and_structure():
    """gamma bounds every coordinate, the sign is the preset's, and the update has the structure of phi."""
    params = coordinate_lstm().init(jax.random.key(0))
    gradient = jax.tree.map(lambda p: 1e-3 * jax.random.normal(jax.random.key(1), p.shape), PHI)
    updates = {}
    for sign in (1, -1):
        teacher = coordinate_lstm(1e-2, update_sign=sign)
        updates[sign], _ = teacher.update(params, teacher.hidden(PHI), gradient, PHI)
        chex.assert_trees_all_equal_shapes(updates[sign], PHI)
        assert all(jnp.abs(leaf).max() < 1e-2 for leaf in jax.tree.leaves(updates[sign]))
    chex.assert_trees_all_close(updates[1], jax.tree.map(jnp.negative, updates[-1]))


def test_coordinates_share_weights_and_not_states():
    teacher = coordinate_lstm()
    params, hidden = teacher.init(jax.random.key(0)), teacher.hidden(jnp.zeros(5))
    gradient = 1e-3 * jnp.arange(5.0)
    order = jnp.array([3, 1, 4, 0, 2])
    permute = lambda tree: jax.tree.map(lambda x: x[order], tree)  # noqa: E731
    _, hidden = teacher.update(params, hidden, gradient, jnp.zeros(5))
    straight, _ = teacher.update(params, hidden, gradient**2, jnp.zeros(5))
    permuted, _ = teacher.update(params, permute(hidden), gradient[order] ** 2, jnp.zeros(5))
    chex.assert_trees_all_close(permuted, straight[order], rtol=1e-5)
    fresh, _ = teacher.update(params, teacher.hidden(jnp.zeros(5)), gradient**2, jnp.zeros(5))
    assert jnp.abs(fresh - straight).max() > 1e-6  # the hidden state matters


def test_odd_teacher_has_no_offset():
    teacher = coordinate_lstm(odd=True)
    params, hidden = teacher.init(jax.random.key(0)), teacher.hidden(jnp.zeros(4))
    gradient = jnp.array([1e-2, -1e-3, 1e-6, 0.0])
    up, up_hidden = teacher.update(params, hidden, gradient, jnp.zeros(4))
    down, down_hidden = teacher.update(params, hidden, -gradient, jnp.zeros(4))
    chex.assert_trees_all_close(up, -down, atol=1e-9)
    assert up[3] == 0 and jnp.all(up[:3] != 0)
    second, _ = teacher.update(params, up_hidden, gradient, jnp.zeros(4))
    mirrored, _ = teacher.update(params, down_hidden, -gradient, jnp.zeros(4))
    chex.assert_trees_all_close(second, -mirrored, atol=1e-9)


@pytest.mark.parametrize("odd", [False, True])
def test_a_window_clears_the_memory(odd):
    """In the first round of every window the update is that of a fresh hidden state; within one, that of no window."""
    teacher, endless = (coordinate_lstm(odd=odd, window=window) for window in (2, 0))
    params = teacher.init(jax.random.key(0))
    hidden, kept = teacher.hidden(PHI), endless.hidden(PHI)
    step, plain = jax.jit(teacher.update), jax.jit(endless.update)
    for age, gradient in enumerate(gradients(5)):
        kept = endless.hidden(PHI) if age % 2 == 0 else kept
        found, hidden = step(params, hidden, gradient, PHI)
        expected, kept = plain(params, kept, gradient, PHI)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-9)
    with pytest.raises(ValueError, match="at least 1, or 0"):
        coordinate_lstm(window=-1)


@pytest.mark.parametrize("units, count", [(None, 84_236), ([20, 20], 4 * (20 * (2 + 20) + 20 * 40 + 20 + 1) + 8 * 41)])
def test_units_are_those_of_the_layers_before_the_last(units, count):
    """Their sizes, and the hidden state that goes with them."""
    teacher = coordinate_lstm(0.1, units=units)
    params, hidden = teacher.init(jax.random.key(0)), teacher.hidden(PHI)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    update, after = teacher.update(params, hidden, PHI, PHI)
    chex.assert_trees_all_equal_shapes((update, after), (PHI, hidden))


@pytest.mark.parametrize("units", [[], [0], [20, -1], [2.5]])
def test_units_that_make_no_layer(units):
    with pytest.raises(ValueError, match=r"units=.*give positive whole numbers"):
        coordinate_lstm(units=units)


@pytest.mark.versions
@pytest.mark.parametrize("name", ["adam", "sgd", "rmsprop"])
def test_optax_teacher_is_the_optimizer(name):
    """It descends: the update is what the optimizer itself gives, with its state as the hidden state."""
    optimizer = {"adam": optax.adam, "sgd": optax.sgd, "rmsprop": optax.rmsprop}[name](1e-2)
    teacher, hidden, state, phi = TEACHERS[name](1e-2), from_optax(optimizer).hidden(PHI), optimizer.init(PHI), PHI
    assert jax.tree.leaves(teacher.init(jax.random.key(0))) == []
    for _ in range(3):
        gradient = jax.tree.map(lambda p: p + 1, phi)
        update, hidden = teacher.update({}, hidden, gradient, phi)
        expected, state = optimizer.update(gradient, state, phi)
        chex.assert_trees_all_close(update, expected)
        assert all(jnp.all(leaf < 0) for leaf in jax.tree.leaves(update))
        phi = optax.apply_updates(phi, update)


def gradients(rounds):
    """Hypergradients of some rounds."""
    return [
        jax.tree.map(lambda p, r=r: jax.random.normal(jax.random.key(r), p.shape) / 10**r, PHI) for r in range(rounds)
    ]


@pytest.mark.parametrize("odd", [False, True])
def test_a_silent_lstm_begins_with_zero_and_learns(odd):
    """Whatever the hypergradient, for several rounds; and what it puts out has a derivative with respect to it."""
    teacher = coordinate_lstm(silent=True, odd=odd)
    params, hidden = teacher.init(jax.random.key(0)), teacher.hidden(PHI)
    for gradient in gradients(3):
        update, after = teacher.update(params, hidden, gradient, PHI)
        assert all(not jnp.any(leaf) for leaf in jax.tree.leaves(update))
        total = lambda tau, g=gradient, m=hidden: optax.tree.sum(teacher.update(tau, m, g, PHI)[0])  # noqa: E731
        slope = jax.grad(total)(params)
        assert jnp.abs(slope[-1].input_kernel).max() > 0
        hidden = after
    loud = coordinate_lstm(odd=odd).init(jax.random.key(0))
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), params, loud)
    assert all(jax.tree.leaves(same[:-1])) and not any(same[-1])  # all layers but the last are drawn as ever


def test_a_sum_of_teachers():
    """With a silent LSTM it is the optimizer; with a loud one both updates are added, each hidden state its own."""
    adam = from_optax(optax.adam(1e-2))
    for silent in (True, False):
        lstm = coordinate_lstm(1e-3, silent=silent)
        both = sum_of(adam, lstm)
        tau = both.init(jax.random.key(0))
        assert tau[0] == {}
        hidden, alone, corrections = both.hidden(PHI), adam.hidden(PHI), lstm.hidden(PHI)
        for gradient in gradients(3):
            found, hidden = both.update(tau, hidden, gradient, PHI)
            expected, alone = adam.update({}, alone, gradient, PHI)
            correction, corrections = lstm.update(tau[1], corrections, gradient, PHI)
            chex.assert_trees_all_close(found, jax.tree.map(jnp.add, expected, correction), rtol=1e-6)
            moved = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(correction))
            assert moved == 0 if silent else moved > 0


@pytest.mark.parametrize("name", teachers.shipped())
def test_every_shipped_teacher_descends(name):
    """It loads, its card is complete, and its updates go against a hypergradient that stays the same."""
    card, teacher = teachers.card(name), teachers.load(name)
    assert set(card) >= {"teacher", "dln", "student", "trained_on", "seed", "scores", "command", "commit", "sha256"}
    assert card["trained_on"]["held_out"] > 0 and card["commit"]
    params, phi = teacher.init(jax.random.key(0)), build_loss("dln", 7, **card["dln"]).init(jax.random.key(1))
    hidden, moved = teacher.hidden(phi), phi
    gradient = jax.tree.map(lambda p: 1e-3 * jax.random.normal(jax.random.key(2), p.shape), phi)
    step = jax.jit(teacher.update)
    for _ in range(5):
        update, hidden = step(params, hidden, gradient, moved)
        moved = jax.tree.map(jnp.add, moved, update)
    change = jax.tree.map(lambda a, b, g: jnp.sum((a - b) * g), moved, phi, gradient)
    assert sum(jax.tree.leaves(change)) < 0


ZERO = {  # every teacher by name, and what an LSTM can be besides
    **{name: lambda name=name: TEACHERS[name](1e-2) for name in TEACHERS},
    "odd": lambda: coordinate_lstm(1e-2, odd=True),
    "silent, with a window": lambda: coordinate_lstm(1e-2, silent=True, window=2),
    "without preprocessing": lambda: coordinate_lstm(1e-2, preprocess=None),
    "beside Adam": lambda: teachers.build_teacher("lstm", 1e-2, base="adam"),
}


@pytest.mark.parametrize("name", ZERO)
def test_a_hypergradient_that_is_exactly_zero(name, x64, small_lstm):
    """As of a validation batch that is wholly masked: update and derivatives are sound."""
    teacher = ZERO[name]()
    params, phi = jax.tree.map(jnp.asarray, (teacher.init(jax.random.key(3)), PHI))
    zero, some = jax.tree.map(jnp.zeros_like, phi), jax.tree.map(lambda p: jnp.sin(p + 1.0), phi)
    draw = lambda p: jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape)  # noqa: E731
    way, weights = jax.tree.map(draw, params), jax.tree.map(draw, phi)

    def total(params, gradients):
        hidden, result = teacher.hidden(phi), 0.0
        for gradient in gradients:
            update, hidden = teacher.update(params, hidden, gradient, phi)
            result += sum(jax.tree.leaves(jax.tree.map(jnp.vdot, update, weights)))
        return result

    def by_hypergradient(params):
        move = lambda h: total(params, (jax.tree.map(lambda w: h * w, weights),))  # noqa: E731
        return jax.grad(move)(0.0), (move(1e-7) - move(-1e-7)) / 2e-7

    @jax.jit
    def compute(params):
        found = []
        for gradients in ((zero,), (zero, zero), (some, zero)):
            move = lambda h, g=gradients: total(jax.tree.map(lambda p, d: p + h * d, params, way), g)  # noqa: E731
            found.append((move(0.0), jax.grad(move)(0.0), (move(1e-5) - move(-1e-5)) / 2e-5))
        return found

    if "adam" not in name.lower():  # whose slope has NaN there without eps_root: no method differentiates by it
        slope, difference = jax.jit(by_hypergradient)(params)
        np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-11)
    rows = compute(params)
    for value, slope, difference in rows:
        assert jnp.isfinite(value)
        np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-11)
    assert rows[-1][1] != 0 or not jax.tree.leaves(params)  # of an odd teacher the others are zero, as they should be
