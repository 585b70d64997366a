"""What test_parallel.py compares, computed on 4 simulated devices in a process of its own; prints one JSON object.

The argument says of what: batches or seeds.

Simulated devices must be there before JAX starts, and they change the thread pool of all that runs beside them.
"""

import gc
import json
import sys
import time
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import toy

from l2t_jax import hypergradient, unroll
from l2t_jax.data.order import Plan
from l2t_jax.memory import MEMORY_MODES
from l2t_jax.methods.l2t_dln import l2t_dln
from l2t_jax.runs import parallel, training
from l2t_jax.runs.parallel import AXIS, ONE, Layout
from l2t_jax.students import from_linen

ROUNDS, N, B, V, EXAMPLES = 2, 3, 8, 16, 64
SEEDS = Layout(1, 3, "seeds")  # each on a device of its own
CASES = [*((memory, 2) for memory in MEMORY_MODES), ("save", 4)]  # memory mode, devices
PLAN = Plan(9, N, B, V, 0.5, EXAMPLES, 2)


def say(what):
    """A sign of life: who waits sees that it gets on."""
    print(f"{time.process_time():.1f} s: {what}", file=sys.stderr, flush=True)


def noisy_gather(data, indices, keys):
    """Every example gets noise of its own key, so that a draw that depended on the devices would show."""
    batch = toy.task.gather(data, indices, None)
    noise = jax.vmap(lambda key: jax.random.normal(key, batch.inputs.shape[-1:]))(keys.reshape(-1))
    return batch._replace(inputs=batch.inputs + 0.1 * noise.reshape(batch.inputs.shape))


TASK = toy.task._replace(gather=noisy_gather, draws=True)


def method(memory, axis_name):
    """L2T-DLN with momentum, weight decay and BatchNorm; the teacher learns by SGD, so that its gradient shows."""
    return l2t_dln(
        from_linen(toy.Network(axis_name)),
        toy.task,
        toy.small_loss(),
        toy.teacher,
        optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.1, momentum=0.9)),
        optax.sgd(1.0),
        memory=memory,
        axis_name=axis_name,
    )


def state(memory, seed):
    initial = method(memory, None).init(jax.random.key(seed), jnp.zeros((2, 5)))
    return toy.to_x64(initial)


def compiled(memory, layout):
    return training.compile_rounds(method(memory, layout.axis_name), TASK, layout)


compiled_once = lru_cache(compiled)


def run(memory, layout, seeds=(0,), counts=None, build=compiled_once):
    """Some rounds of each seed: its state, and its metrics."""
    say(f"{memory}, {layout}")
    program = build(memory, layout)
    states = program.place([state(memory, seed) for seed in seeds])
    counts = counts or [ROUNDS] * len(seeds)
    dispatches = [training._dispatch(seed, 0, count, PLAN) for seed, count in zip(seeds, counts, strict=True)]
    states, metrics, done = program(states, program.data(toy.to_x64(toy.batch(9, EXAMPLES))), dispatches)
    assert done == counts
    return list(zip(program.take(states), metrics, strict=False))  # some places may be empty


def apart(found, reference):
    """The largest difference, relative to the largest entry: a bias before BatchNorm has no gradient but rounding."""
    leaves, references = jax.tree.leaves(found), jax.tree.leaves(reference)
    largest = max(float(np.max(np.abs(b), initial=0)) for b in references)
    return max(float(np.max(np.abs(a - b), initial=0)) for a, b in zip(leaves, references, strict=True)) / largest


def part(result):
    """By name, what must agree: everything a round gives."""
    state, metrics = result
    return {
        "student": state.student.params,
        "batch statistics": state.student.batch_stats,
        "momentum": state.student.optimizer_state,
        "loss": state.loss,
        "teacher": state.teacher,
        "hypergradient": metrics["hypergradient_norm"],
        "teacher gradient": metrics["teacher_gradient_norm"],
        "validation error": metrics["validation_error"],
    }


def compare(found, reference):
    found, reference = part(found), part(reference)
    return {name: apart(found[name], reference[name]) for name in found}


def batches():
    """Divided batches against whole ones, and what each mistake of the means would do."""
    reference = run("save", ONE)[0]

    def canary(module, replacement):
        real = module.mean_over
        module.mean_over = replacement
        try:
            return compare(run("save", Layout(1, 2, "batch"), build=compiled)[0], reference)
        finally:
            module.mean_over = real

    return {
        "marked": {memory: marked(memory) for memory in MEMORY_MODES},
        "agree": {
            f"{memory}, {d} devices": compare(run(memory, Layout(1, d, "batch"))[0], reference) for memory, d in CASES
        },
        **seeds(Layout(3)),
        "unequal": unequal(),
        "together": compare(run("save", Layout(2, 2, "batch"), (3, 0))[1], reference),
        "canaries": {
            "psum of the hypergradient": canary(hypergradient, lambda axis, tree: jax.lax.psum(tree, AXIS)),
            "no mean of the hypergradient": canary(hypergradient, lambda axis, tree: tree),
            "psum of the student's gradient": canary(unroll, lambda axis, tree: jax.lax.psum(tree, AXIS)),
            "no mean of the student's gradient": canary(unroll, lambda axis, tree: tree),
        },
    }


@lru_cache(1)
def marked_problem():
    """phi, the student's state, the batches, and the hypergradient on one device."""
    student, loss, optimizer = from_linen(toy.Network()), toy.small_loss(), optax.sgd(0.1, momentum=0.9)
    given = toy.to_x64(
        (
            loss.init(jax.random.key(1)),
            unroll.init_state(student.init(jax.random.key(0), jnp.zeros((2, 5))), optimizer),
            toy.batch(2, N, B),
            toy.batch(3, V),
        )
    )
    inner, outer = unroll.inner_objective(student, toy.task, loss), unroll.outer_objective(student, toy.task)
    return given, jax.jit(hypergradient.hypergradient(inner, outer, optimizer, memory="save"))(*given).gradient


def marked(memory):
    """A hypergradient under a `jax.shard_map` that checks what varies, phi and state marked, against one device."""
    say(f"{memory}, marked")
    student, loss = from_linen(toy.Network(AXIS)), toy.small_loss()
    optimizer = optax.sgd(0.1, momentum=0.9)
    inner, outer = unroll.inner_objective(student, toy.task, loss), unroll.outer_objective(student, toy.task)

    def local(*given):
        phi, start = jax.tree.map(lambda x: jax.lax.pcast(x, AXIS, to="varying"), given[:2])
        compute = hypergradient.hypergradient(inner, outer, optimizer, memory=memory, axis_name=AXIS)
        return compute(phi, start, *given[2:]).gradient

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), (AXIS,))
    nothing, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(AXIS)
    specs = nothing, nothing, jax.sharding.PartitionSpec(None, AXIS), split
    divided = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=nothing))
    given, whole = marked_problem()
    return apart(divided(*given), whole)


def seeds(layout=SEEDS):
    """Seeds against single runs."""
    others = [run("save", ONE, (seed,))[0] for seed in range(3)]
    return {"seeds": [compare(a, b) for a, b in zip(run("save", layout, range(3)), others, strict=True)]}


def unequal():
    """Seeds side by side and on devices, of unequal length, and one place empty."""
    some = run("save", Layout(2, 2, "seeds"), (0, 1, 2), counts=[2, 1, 0])
    return [
        apart(some[0][0], run("save", ONE)[0][0]),
        apart(some[1][0], run("save", ONE, (1,), counts=[1])[0][0]),
        apart(some[2][0], state("save", 2)),
    ]


if __name__ == "__main__":
    gc.set_threshold(50_000, 10, 10)  # as in conftest.py
    jax.config.update("jax_enable_x64", True)
    parallel.start(4)
    found = {"batches": batches, "seeds": seeds}[sys.argv[1]]()
    json.dump({"device_count": jax.device_count(), **found}, sys.stdout)
