"""Pictures: learning curves over seeds, learned losses as surfaces, costs. With image_panels all that knows matplotlib.

Legend: R points of a curve, G grid points along one axis of a surface. All write `path` and return the Figure.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike

from l2t_jax.types import Array

# Okabe and Ito's colours, told apart by colour-blind readers too, without the yellow that white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":", "-.")  # a second round of the colours is dashed
_CELL = (3.4, 3.7)  # inches of one surface; 0.6 of the width are for the labels of its z axis
_PANEL = 4.4  # inches of a panel of curves beside others
_FEW = 6  # curves whose legend has room among them
_MOST_POINTS = 2000  # a line has no more, since a picture has no more pixels

Points = dict[str, list[tuple[float, float]]]  # name -> (x, y) of each point
Curves = dict[str, tuple[Array | np.ndarray, Array | np.ndarray]]  # name -> x [R], y [seeds, R]


def learning_curves(
    path: str | Path,
    curves: Curves,
    *,
    ylabel: str,
    title: str,
    log_y: bool = True,
    linear_within: float | None = None,
    window: int | None = None,
    xlabel: str = "student steps",
    log_x: bool = False,
) -> Figure:
    """Draw the mean over seeds of every curve, with a band from the lowest to the highest seed.

    Args:
        path: the picture, its format by the suffix.
        curves: name -> (x [R], y [seeds, R]); points that are not finite are left out.
        ylabel: quantity and unit of y.
        title: above the plot.
        log_y: logarithmic y axis; then points that are not positive are left out too.
        linear_within: with log_y: keep all points, on an axis that is linear up to this size on both sides of zero and
            logarithmic beyond.
        window: points of the running median over which mean and band are smoothed (1: none); by default 1/50 of R above
            100 points. Where it smooths, the mean as it was is drawn faintly behind.
        xlabel: quantity and unit of x.
        log_x: logarithmic x axis.

    Raises:
        ValueError: where a curve's x and y do not fit each other.
    """
    many = len(curves) > _FEW
    figure = Figure(figsize=(9 if many else 7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    positive = log_y and linear_within is None
    for index, (name, (x, y)) in enumerate(curves.items()):
        x, y = _checked(name, x, y)
        y = np.where(np.isfinite(y) & ((y > 0) | (not positive)), y, np.nan)
        _curve(axes, name, x, y, window or default_window(x.size), index, 0.08 if many else 0.18)
    if positive:
        axes.set_yscale("log", nonpositive="mask")
    elif log_y:
        axes.set_yscale("symlog", linthresh=linear_within)
    if log_x:
        axes.set_xscale("log")
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    _frame(axes)
    if many:  # beside the curves, which leave no room
        figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    elif curves:
        axes.legend(frameon=False, fontsize="small")
    return write(figure, path)


def norms(path: str | Path, curves: Curves, *, title: str, ylabel: str = "norm", window: int | None = None) -> Figure:
    """`learning_curves` on a logarithmic axis, for norms (of hypergradients, of updates), which range over decades."""
    return learning_curves(path, curves, ylabel=ylabel, title=title, log_y=True, window=window)


def loss_surfaces(path: str | Path, surfaces: Sequence[tuple[str, ArrayLike]], *, title: str) -> Figure:
    """Draw a learned loss at several moments of its training, as Figure 3 of the L2T-DLN paper does.

    Args:
        path: the picture, its format by the suffix.
        surfaces: (name, value of the loss [G, G]) per moment, left to right. The first axis is the prediction of the
            right class and the second that of a wrong class, both from 0 to 1. Each surface has a z axis of its own, as
            their ranges differ by orders; the range is printed above it.
        title: above all of them.

    Raises:
        ValueError: where there is no surface, or one is not of two axes.
    """
    if not surfaces:
        raise ValueError("There is no surface to draw: give at least one (name, values [G, G]).")
    width, height = _CELL[0] * len(surfaces), _CELL[1]
    figure = Figure(figsize=(width, height))
    for index, (name, values) in enumerate(surfaces):
        left = (index * _CELL[0] + 0.05) / width
        axes = figure.add_axes((left, 0.04, (_CELL[0] - 0.6) / width, 0.78), projection="3d")
        _surface(axes, name, np.asarray(values, np.float64))
    figure.suptitle(title, y=0.98)
    return write(figure, path)


def overview(
    path: str | Path, panels: Mapping[str, Curves], surfaces: Sequence[tuple[str, ArrayLike]], *, title: str
) -> Figure:
    """Draw one picture of a run: curves side by side, then a learned loss, with one legend.

    Args:
        path: the picture, its format by the suffix.
        panels: what is on the y axis -> its curves, as `learning_curves` takes them.
        surfaces: as `loss_surfaces` takes them, or none.
        title: above all.

    Raises:
        ValueError: where there is nothing, or a curve's x and y do not fit each other.
    """
    if not panels and not surfaces:
        raise ValueError("There is nothing to draw: give at least one panel or surface.")
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    wide = _PANEL * len(panels) + _CELL[0] * len(surfaces)
    columns = max(1, int(_PANEL * len(panels) / (0.6 + 0.07 * max(map(len, names), default=1))))
    below = 0.75 + 0.2 * math.ceil(len(names) / columns)  # inches of the legend and of what the x axis says
    high = 3.1 + below
    figure = Figure(figsize=(wide, high))
    legend: dict[str, Any] = {}
    for place, (label, curves) in enumerate(panels.items()):
        axes = figure.add_axes(((_PANEL * place + 0.75) / wide, below / high, 3.5 / wide, 2.5 / high))
        for name, (x, y) in curves.items():
            x, y = _checked(name, x, y)
            _curve(axes, name, x, y, default_window(x.size), names.index(name), 0.18)
        axes.set_title(label, fontsize="medium")
        axes.set_xlabel("student steps")
        _frame(axes)
        legend |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    for place, (name, values) in enumerate(surfaces):
        left = _PANEL * len(panels) + place * _CELL[0]
        axes = figure.add_axes((left / wide, 0.1, (_CELL[0] - 0.6) / wide, 0.74), projection="3d")
        _surface(axes, name, np.asarray(values, np.float64))
    if legend:
        at = (_PANEL * len(panels) / 2 / wide, 0.01)
        how = {"ncols": columns, "fontsize": "small", "frameon": False}
        figure.legend(legend.values(), legend, loc="lower center", bbox_to_anchor=at, **how)
    figure.suptitle(title, y=0.98)
    return write(figure, path)


def costs(
    path: str | Path,
    panels: dict[str, Points],
    *,
    dashed: Collection[str],
    marks: tuple[str, Sequence[float], Sequence[float]],
    xlabel: str,
    ylabel: str,
    title: str,
) -> Figure:
    """Draw costs against a size, both logarithmic, one panel for each problem and one legend for all of them.

    Args:
        path: the picture, its format by the suffix.
        panels: title -> name -> [(size, cost), ...]; a name looks the same in all panels.
        dashed: names that are drawn dashed and come last in the legend.
        marks: (label, sizes, costs), grey marks in every panel for something that was measured elsewhere.
        xlabel, ylabel: quantities and units of size and cost.
        title: above all panels.

    Raises:
        ValueError: where there is no panel.
    """
    if not panels:
        raise ValueError("There is no cost to draw: give at least one panel.")
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    solid = [name for name in names if name not in dashed]
    groups = (("-", "o", solid), ("--", "s", [name for name in names if name in dashed]))
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.8 * columns + 2.4, 3.2 * rows + 0.8), layout="constrained")
    legend: dict[str, Any] = {}
    for index, (name, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, index)
        legend[marks[0]] = axes.plot(marks[1], marks[2], "x", color="0.6", markersize=5)[0]
        for style, marker, group in groups:
            for place, line in enumerate(group):
                x, y = zip(*sorted(lines.get(line, [(math.nan, math.nan)])), strict=True)
                colour = COLOURS[place % len(COLOURS)]
                legend[line] = axes.plot(x, y, style, marker=marker, markersize=3, linewidth=1.3, color=colour)[0]
        sizes = sorted({*marks[1], *(size for points in lines.values() for size, _ in points)})
        axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
        axes.set_title(name, fontsize="medium")
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes], fontsize="small")
        axes.minorticks_off()
        _frame(axes)
    order = [*solid, *groups[1][2], marks[0]]
    figure.legend([legend[name] for name in order], order, loc="outside right upper", frameon=False, fontsize="small")
    figure.suptitle(title, x=0.01, horizontalalignment="left")  # away from the legend
    return write(figure, path)


def reached(
    path: str | Path, lines: Mapping[str, Sequence[tuple[float, float, float]]], *, xlabel: str, ylabel: str, title: str
) -> Figure:
    """Draw what was reached against what it cost, which is logarithmic.

    Args:
        path: the picture, its format by the suffix.
        lines: name -> [(cost, mean, standard deviation), ...], joined in this order.
        xlabel, ylabel: quantities and units.
        title: above it.

    Raises:
        ValueError: where there is nothing.
    """
    if not any(lines.values()):
        raise ValueError("There is nothing to draw: give at least one line with a point.")
    figure = Figure(figsize=(8.4, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, line) in enumerate(lines.items()):
        x, y, spread = np.array(line).T if line else np.empty((3, 0))
        style = ("-", "--", ":")[place // len(COLOURS) % 3]
        colour = COLOURS[place % len(COLOURS)]
        axes.errorbar(
            x, y, spread, fmt=style, marker="o", markersize=3, linewidth=1.3, elinewidth=0.8, color=colour, label=name
        )
    axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _frame(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.suptitle(title, x=0.01, horizontalalignment="left")  # away from the legend
    return write(figure, path)


def ablation(
    path: str | Path,
    points: dict[str, list[tuple[Any, float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
) -> Figure:
    """Draw results against the values of one setting, with their standard deviations.

    Args:
        path: the picture, its format by the suffix.
        points: name -> [(value, mean, standard deviation), ...]. Values that are numbers stand on an axis that is
            logarithmic where they range over more than a decade; names stand side by side.
        xlabel, ylabel: quantities and units of value and mean.
        title: above the plot.

    Raises:
        ValueError: where there is no point.
    """
    if not any(points.values()):
        raise ValueError("There is no result to draw: give at least one (value, mean, standard deviation).")
    values = list(dict.fromkeys(value for line in points.values() for value, _, _ in line))
    named = any(isinstance(value, str) for value in values)
    places = {value: float(index) if named else float(value) for index, value in enumerate(values)}
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, line) in enumerate(points.items()):
        x, y, spread = ([row[i] for row in line] for i in range(3))
        style = "o" if named else "o-"
        at = [places[value] + (0.08 * (index - (len(points) - 1) / 2) if named else 0.0) for value in x]
        colour = COLOURS[index % len(COLOURS)]
        axes.errorbar(at, y, spread, fmt=style, color=colour, markersize=4, linewidth=1.4, capsize=2, label=name)
    if not named and min(places.values()) > 0 and max(places.values()) > 10 * min(places.values()):
        axes.set_xscale("log")
    axes.set_xticks(list(places.values()), [f"{value:g}" if not named else value for value in values])
    if named and sum(map(len, map(str, values))) > 60:  # side by side they would overlap
        axes.tick_params("x", labelrotation=40)
        for label in axes.get_xticklabels():
            label.set(horizontalalignment="right", rotation_mode="anchor")
    axes.minorticks_off()
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    _frame(axes)
    axes.legend(frameon=False, fontsize="small")
    return write(figure, path)


def table(
    path: str | Path,
    header: Sequence[str],
    cells: Sequence[Sequence[str]],
    better: Sequence[Sequence[bool | None]],
    *,
    title: str,
) -> Figure:
    """Draw a table of text, its first column to the left.

    Args:
        path: the picture, its format by the suffix.
        header: of each column.
        cells: rows of as many texts.
        better: of each cell, whether it is shaded as better (True), as worse (False) or not at all (None).
        title: above it.

    Raises:
        ValueError: where there is no row, or rows are not as long as the header.
    """
    if not cells or any(len(row) != len(header) for row in (*cells, *better)):
        raise ValueError(f"A table needs rows of {len(header)} cells, as many as its header has.")
    shades = {True: "#CDEBDD", False: "#F6D9C6", None: "white"}
    widths = [max(len(text) for text in column) for column in zip(header, *cells, strict=True)]
    size = max(5.0, 0.6 + 0.095 * sum(widths) + 0.15 * len(widths)), 0.9 + 0.26 * len(cells)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.axis("off")
    drawn = axes.table(
        cellText=[list(row) for row in cells],
        colLabels=list(header),
        cellColours=[[shades[value] for value in row] for row in better],
        colWidths=[width / sum(widths) for width in widths],
        cellLoc="center",
        loc="center",
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8.5)
    drawn.scale(1, 1.25)
    for (row, column), cell in drawn.get_celld().items():
        cell.set_edgecolor("0.85")
        if column == 0:
            cell.set_text_props(ha="left")
            cell.PAD = 0.03
        if row == 0:
            cell.set_text_props(weight="bold")
    figure.suptitle(title, fontsize=9)
    return write(figure, path)


def default_window(points: int) -> int:
    """The odd length of the running median for a curve of so many points."""
    return 1 if points <= 100 else 2 * (points // 100) + 1


def running_median(y: np.ndarray, window: int, at: np.ndarray) -> np.ndarray:
    """Median of the finite ones of the `window` (odd) points of y [R] around each index in `at`; NaN if none is."""
    if not len(at):
        return np.zeros(0)
    half = window // 2
    padded = np.pad(y.astype(np.float64), half, constant_values=np.nan)
    around = sliding_window_view(padded, 2 * half + 1)[at]  # [at, window]
    result = np.full(len(at), np.nan)
    some = np.isfinite(around).any(axis=1)
    result[some] = np.nanmedian(around[some], axis=1)
    return result


def _checked(name: str, x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 1 or y.ndim != 2 or y.shape[1] != x.size:
        raise ValueError(f"Curve {name!r} has x {x.shape} and y {y.shape}: give x [R] and y [seeds, R].")
    return x, y


def _curve(axes: Axes, name: str, x: np.ndarray, y: np.ndarray, window: int, index: int, band: float) -> None:
    colour = COLOURS[index % len(COLOURS)]
    at = np.unique(np.linspace(0, x.size - 1, min(x.size, _MOST_POINTS)).astype(int))
    mean, low, high = _mean(y), np.fmin.reduce(y, axis=0), np.fmax.reduce(y, axis=0)
    if window > 1:
        axes.plot(x[at], mean[at], color=colour, alpha=0.2, linewidth=0.6)
    middle, low, high = (running_median(values, window, at) for values in (mean, low, high))
    if y.shape[0] > 1:
        axes.fill_between(x[at], low, high, color=colour, alpha=band, linewidth=0)
    style = _STYLES[index // len(COLOURS) % len(_STYLES)]
    marker = "o" if np.isfinite(middle).sum() == 1 else None  # a line needs two points
    axes.plot(x[at], middle, style, color=colour, linewidth=1.6, marker=marker, label=name)


def _mean(y: np.ndarray) -> np.ndarray:
    """Mean over the seeds that have a value; NaN where none has."""
    count = np.isfinite(y).sum(axis=0)
    return np.where(count, np.nansum(y, axis=0) / np.maximum(count, 1), np.nan)


def _frame(axes: Axes) -> None:
    axes.grid(True, alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _surface(axes: Any, name: str, z: np.ndarray) -> None:
    if z.ndim != 2:
        raise ValueError(f"Surface {name!r} has shape {z.shape}: give values [G, G].")
    right, wrong = np.meshgrid(*(np.linspace(0, 1, size) for size in z.shape), indexing="ij")
    finite = z[np.isfinite(z)]
    low, high = (finite.min(), finite.max()) if finite.size else (math.nan, math.nan)
    axes.plot_surface(right, wrong, z, cmap="viridis", rcount=40, ccount=40, linewidth=0, antialiased=True)
    axes.set_title(f"{name}\n{low:.3g} to {high:.3g}" if finite.size else f"{name}\nnot finite", fontsize=10, pad=-6)
    axes.set_xlabel("right class", fontsize=8, labelpad=-4)
    axes.set_ylabel("wrong class", fontsize=8, labelpad=-4)
    axes.set(xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    axes.tick_params(labelsize=7, pad=-1)
    axes.tick_params(axis="z", pad=6)
    axes.zaxis.set_major_locator(MaxNLocator(4))
    axes.zaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.view_init(elev=25, azim=-60)


def write(figure: Figure, path: str | Path) -> Figure:
    """Write a picture, its folder too."""
    FigureCanvasAgg(figure)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return figure
