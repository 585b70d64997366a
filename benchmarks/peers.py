"""The same hypergradient by the PyTorch libraries that users come from, to compare ours with.

d e_val(theta^N) / d phi, theta^i = theta^{i-1} - 0.1 d/dtheta L_phi(theta^{i-1}), L_phi the released DLN, float32, CPU.
Nothing here needs JAX, and torch is imported only when a program is built.

Legend: B batch, V validation batch, N unroll length, C classes, c channels, theta student parameters, phi those of L.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

    Run = Callable[[], Sequence[Tensor]]  # -> d e_val / d phi, [out, in] for each layer; or theta^N ("torch steps")

LEARNING_RATE = 0.1
PACKAGES = {"torch": "torch", "higher": "higher", "torchopt": "torchopt", "betty": "betty-ml"}  # import -> pip's name
# The dense kernel that reads a flattened map, and the side of that map: HWC is flattened in JAX, CHW in torch.
FLATTENED = {
    "w1": ("params/output/kernel", 1),
    "w2": ("params/dense1/kernel", 5),
    "w3": ("params/hidden/kernel", 28),
    "wide": ("params/output/kernel", 2),
}


class Problem(NamedTuple):
    """What every program starts from, in torch's layouts."""

    student: nn.Module  # theta^0, in training mode: BatchNorm by batch statistics, for the validation error too
    loss: nn.Module  # (logits [B, C], targets [B]) -> mean training loss []; its parameters are phi
    error: nn.Module  # (logits [V, C], targets [V]) -> mean validation error []
    batches: list[tuple[Tensor, Tensor]]  # N of inputs [B, c, H, W] and targets [B]
    validation: tuple[Tensor, Tensor]


def missing(program: str) -> str | None:
    """Say in one line what to install before a program can be built; None if nothing is missing."""
    modules = ["torch", program] if program in PACKAGES else ["torch"]
    absent = [PACKAGES[module] for module in modules if importlib.util.find_spec(module) is None]
    return f"{program} needs packages that are not installed: pip install {' '.join(absent)}" if absent else None


def build(program: str, workload: str, arrays: dict[str, np.ndarray]) -> Callable[[], dict[str, np.ndarray]]:
    """Prepare a program; each call of what is returned does its work once, from the same theta^0.

    Args:
      program: a key of `PROGRAMS`.
      workload: a key of `FLATTENED`: w1, w2, w3 of `hypergradient_cost`; "wide" is the released code's ResNet-8.
      arrays: "params/...", "phi/i/kernel", "batches/inputs" [N, B, H, W, c], "batches/targets" [N, B],
        "validation/inputs" [V, H, W, c], "validation/targets" [V], as `save_arrays` names them; others are ignored.
    Returns:
      a function that gives the hypergradient, {"0/kernel": [in, out], ...}; for "torch steps" theta^N, named as ours.
    """
    import torch

    def batch(inputs: np.ndarray, targets: np.ndarray) -> tuple[Tensor, Tensor]:
        # NCHW: channels_last was no faster for hypergradients of w1 and wide (only for plain steps of w1, by 15 %), and
        # on w1 a digit further from float64.
        return torch.tensor(inputs).permute(0, 3, 1, 2).contiguous(), torch.tensor(targets, dtype=torch.long)

    dense, grid = FLATTENED[workload]
    sides = {name: grid if name == dense else 1 for name in arrays if name.startswith("params/")}
    student, loss = _student(workload), _dln()
    theta = dict(student.named_parameters())
    with torch.no_grad():
        for name, side in sides.items():
            theta[_torch_name(name)].copy_(torch.tensor(_to_torch(arrays[name], side)))
        for i, weight in enumerate(loss.parameters()):
            weight.copy_(torch.tensor(arrays[f"phi/{i}/kernel"].T))
    batches = [batch(*pair) for pair in zip(arrays["batches/inputs"], arrays["batches/targets"], strict=True)]
    validation = batch(arrays["validation/inputs"], arrays["validation/targets"])
    run = PROGRAMS[program](Problem(student, loss, torch.nn.CrossEntropyLoss(), batches, validation))

    def call() -> dict[str, np.ndarray]:
        found = [tensor.numpy() for tensor in run()]
        if program != "torch steps":
            return {f"{i}/kernel": weight.T for i, weight in enumerate(found)}
        final = dict(zip(theta, found, strict=True))
        return {name.removeprefix("params/"): _to_jax(final[_torch_name(name)], side) for name, side in sides.items()}

    return call


def _torch_name(name: str) -> str:
    """params/stem_norm/scale -> stem_norm.weight."""
    *layers, leaf = name.split("/")[1:]
    return ".".join([*layers, "bias" if leaf == "bias" else "weight"])


def _to_torch(array: np.ndarray, side: int) -> np.ndarray:
    """HWIO -> OIHW; [side * side * c, out] -> [out, c * side * side]; vectors stay."""
    if array.ndim == 2:
        return array.reshape(side, side, -1, array.shape[1]).transpose(3, 2, 0, 1).reshape(array.shape[1], -1)
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array


def _to_jax(array: np.ndarray, side: int) -> np.ndarray:
    """The inverse of `_to_torch`, always a copy."""
    if array.ndim == 2:
        array = array.reshape(array.shape[0], -1, side, side).transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    return np.array(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array)


def _student(workload: str) -> nn.Module:
    """The student of a workload, its layers named as ours."""
    from torch import nn

    if workload == "w2":
        layers = [("pad", nn.ZeroPad2d(2)), ("conv1", nn.Conv2d(1, 6, 5)), ("relu1", nn.ReLU())]
        layers += [("pool1", nn.MaxPool2d(2)), ("conv2", nn.Conv2d(6, 16, 5)), ("relu2", nn.ReLU())]
        layers += [("pool2", nn.MaxPool2d(2)), ("flatten", nn.Flatten()), ("dense1", nn.Linear(400, 120))]
        layers += [("relu3", nn.ReLU()), ("dense2", nn.Linear(120, 84)), ("relu4", nn.ReLU())]
        return nn.Sequential(OrderedDict([*layers, ("output", nn.Linear(84, 10))]))
    if workload == "w3":
        layers = [("flatten", nn.Flatten()), ("hidden", nn.Linear(784, 500)), ("tanh", nn.Tanh())]
        return nn.Sequential(OrderedDict([*layers, ("output", nn.Linear(500, 10))]))
    return _resnet8(64 if workload == "wide" else 16, FLATTENED[workload][1])


def _resnet8(width: int, grid: int) -> nn.Module:
    """ResNet-8 with 1x1 convolutions where the shape changes, its last map averaged over grid x grid cells.

    BatchNorm is torch's default, so it keeps running statistics as a user's does; no result here reads them.
    """
    from torch import nn

    class Block(nn.Module):
        """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x))."""

        def __init__(self, channels: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(channels // stride, channels, 3, stride, padding=1, bias=False)
            self.norm1 = nn.BatchNorm2d(channels)
            self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.norm2 = nn.BatchNorm2d(channels)
            self.strided = stride > 1
            if self.strided:
                self.shortcut_conv = nn.Conv2d(channels // stride, channels, 1, stride, bias=False)
                self.shortcut_norm = nn.BatchNorm2d(channels)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
            return (y + (self.shortcut_norm(self.shortcut_conv(x)) if self.strided else x)).relu()

    layers = [("stem_conv", nn.Conv2d(3, width, 3, padding=1, bias=False)), ("stem_norm", nn.BatchNorm2d(width))]
    layers += [("stem_relu", nn.ReLU()), ("stage1_block1", Block(width, 1))]
    layers += [("stage2_block1", Block(2 * width, 2)), ("stage3_block1", Block(4 * width, 2))]
    layers += [("pool", nn.AdaptiveAvgPool2d(grid)), ("flatten", nn.Flatten())]
    return nn.Sequential(OrderedDict([*layers, ("output", nn.Linear(4 * width * grid**2, 10))]))


def _dln() -> nn.Module:
    """The released DLN: mean over B of 1/C sum_{j != y} net([s_y, s_j, 1, 0]), s = sigmoid(logits), no biases."""
    import torch
    from torch import nn

    class DLN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            hidden = [layer for _ in range(3) for layer in (nn.Linear(40, 40, bias=False), nn.LeakyReLU(0.01))]
            first, last = nn.Linear(4, 40, bias=False), nn.Linear(40, 1, bias=False)
            self.net = nn.Sequential(first, nn.LeakyReLU(0.01), *hidden, last)

        def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
            s, right = logits.sigmoid(), targets[:, None]
            pairs = torch.stack([s.gather(1, right).expand_as(s), s, torch.ones_like(s), torch.zeros_like(s)], -1)
            return self.net(pairs)[..., 0].scatter(1, right, 0.0).mean()

    return DLN()


def _descend(values: Iterable[Tensor], grads: Iterable[Tensor]) -> list[Tensor]:
    """values - eta * grads, in one operation a tensor."""
    return [value.sub(grad, alpha=LEARNING_RATE) for value, grad in zip(values, grads, strict=True)]


def _gradient(
    problem: Problem, objective: nn.Module, theta: dict[str, Tensor], batch: tuple[Tensor, Tensor], keep: bool = False
) -> Sequence[Tensor]:
    """d objective / d theta on a batch, itself differentiable where `keep`."""
    import torch

    outputs = torch.func.functional_call(problem.student, theta, batch[0])
    return torch.autograd.grad(objective(outputs, batch[1]), list(theta.values()), create_graph=keep)


def _through(problem: Problem, student: Callable[[Tensor], Tensor]) -> Sequence[Tensor]:
    """d e_val / d phi, of a student whose parameters remember how phi made them."""
    import torch

    inputs, targets = problem.validation
    return torch.autograd.grad(problem.error(student(inputs), targets), list(problem.loss.parameters()))


def _steps(problem: Problem) -> Run:
    """N plain steps of torch.optim.SGD: theta^N and no hypergradient."""
    import torch

    theta, loss = list(problem.student.parameters()), problem.loss.requires_grad_(False)
    optimizer = torch.optim.SGD(theta, lr=LEARNING_RATE)
    start = [p.detach().clone() for p in theta]

    def run() -> Sequence[Tensor]:
        with torch.no_grad():
            for p, value in zip(theta, start, strict=True):
                p.copy_(value)
        for inputs, targets in problem.batches:
            optimizer.zero_grad()
            loss(problem.student(inputs), targets).backward()
            optimizer.step()
        return [p.detach() for p in theta]

    return run


def _create_graph(problem: Problem) -> Run:
    """Plain autodiff of the unroll: all that its steps computed is kept."""
    import torch

    def run() -> Sequence[Tensor]:
        theta: dict[str, Tensor] = dict(problem.student.named_parameters())
        for batch in problem.batches:
            grads = _gradient(problem, problem.loss, theta, batch, keep=True)
            theta = dict(zip(theta, _descend(theta.values(), grads), strict=True))
        return _through(problem, lambda inputs: torch.func.functional_call(problem.student, theta, inputs))

    return run


def _rmd(problem: Problem) -> Run:
    """Reverse-mode differentiation by hand, from the trajectory of theta alone, each gradient computed again.

    From v = d e_val / d theta^N and h = 0, for each step backwards:
    h <- h - eta (d^2 L / d phi d theta) v, v <- v - eta (d^2 L / d theta^2) v.
    """
    import torch

    phi = list(problem.loss.parameters())

    def run() -> Sequence[Tensor]:
        theta: dict[str, Tensor] = dict(problem.student.named_parameters())
        trajectory = []
        for batch in problem.batches:
            trajectory.append(theta)
            grads = _gradient(problem, problem.loss, theta, batch)
            with torch.no_grad():
                moved = _descend(theta.values(), grads)
            theta = dict(zip(theta, [p.requires_grad_() for p in moved], strict=True))
        v, h = _gradient(problem, problem.error, theta, problem.validation), [torch.zeros_like(p) for p in phi]
        for i in reversed(range(len(trajectory))):
            grads = _gradient(problem, problem.loss, trajectory[i], problem.batches[i], keep=True)
            wanted = [*phi, *trajectory[i].values()] if i else phi  # nothing reads v before the first step
            products = torch.autograd.grad(grads, wanted, v)
            h = _descend(h, products[: len(phi)])
            v = _descend(v, products[len(phi) :]) if i else v
        return h

    return run


def _higher(problem: Problem) -> Run:
    """higher: a patched copy of the student, and an SGD whose steps stay in the graph."""
    import higher
    import torch

    optimizer = torch.optim.SGD(problem.student.parameters(), lr=LEARNING_RATE)

    def run() -> Sequence[Tensor]:
        with higher.innerloop_ctx(problem.student, optimizer) as (student, differentiable):
            for inputs, targets in problem.batches:
                differentiable.step(problem.loss(student(inputs), targets))
            return _through(problem, student)

    return run


def _torchopt(problem: Problem) -> Run:
    """TorchOpt: MetaSGD puts parameters into the student that stay in the graph."""
    import torchopt

    student = problem.student
    start = torchopt.extract_state_dict(student, by="reference")

    def run() -> Sequence[Tensor]:
        torchopt.recover_state_dict(student, start)
        optimizer = torchopt.MetaSGD(student, lr=LEARNING_RATE)
        for inputs, targets in problem.batches:
            optimizer.step(problem.loss(student(inputs), targets))
        return _through(problem, student)

    return run


def _betty(problem: Problem) -> Run:
    """Betty: an IterativeProblem, whose steps stay in the graph, below an ImplicitProblem with first_order=False.

    That is its exact path. Its default, first_order=True with a type (darts, neumann, cg), differentiates the last
    batch's loss only, and approximately.
    """
    import torch
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.logging import get_logger
    from betty.problems import ImplicitProblem, IterativeProblem

    found: list[Tensor] = []

    class Inner(IterativeProblem):
        def on_inner_loop_start(self) -> None:
            self.params = tuple(p.detach().requires_grad_() for p in self.start)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.fmodule(self.params, self.buffers, inputs)

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return self.outer(self(batch[0]), batch[1])

        def custom_optimizer_step(self) -> tuple[Tensor, ...]:
            # Betty's SGD keeps a momentum buffer even at momentum 0, and with it the freed graph of the call before.
            moved = tuple(_descend(self.params, [p.grad for p in self.params]))
            for p in self.params:
                p.grad = None  # a gradient with a graph and its parameter hold each other for ever
            return moved

    class Outer(ImplicitProblem):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return problem.error(self.inner(batch[0]), batch[1])

        def custom_optimizer_step(self) -> None:
            found[:] = [p.grad for p in self.trainable_parameters()]  # taken, and phi left as it is

    get_logger().setLevel(logging.WARNING)
    n = len(problem.batches)
    sgd = torch.optim.SGD(problem.student.parameters(), lr=LEARNING_RATE)
    unrolled, exact = Config(unroll_steps=n, retain_graph=True), Config(first_order=False)
    inner = Inner("inner", unrolled, problem.student, sgd, None, problem.batches, "cpu")
    outer = Outer("outer", exact, problem.loss, None, None, [problem.validation], "cpu")
    with warnings.catch_warnings(action="ignore"):  # functorch's deprecation
        engine = Engine([inner, outer], EngineConfig(train_iters=n), {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}})
    inner.start = inner.params

    def run() -> Sequence[Tensor]:
        with warnings.catch_warnings(action="ignore"):  # it reads .grad of tensors that are not leaves
            engine.run()
        return found

    return run


PROGRAMS: dict[str, Callable[[Problem], Run]] = {
    "torch steps": _steps,
    "torch create_graph": _create_graph,
    "torch RMD": _rmd,
    "higher": _higher,
    "torchopt": _torchopt,
    "betty": _betty,
}
