"""Pictures are whole, labelled, and show the numbers they were given."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from mpl_toolkits.mplot3d import Axes3D

from l2t_jax.runs.plots import (
    ablation,
    costs,
    default_window,
    learning_curves,
    loss_surfaces,
    norms,
    overview,
    running_median,
)

pytestmark = pytest.mark.versions


def curve(points: int, seeds: int = 3) -> tuple[np.ndarray, np.ndarray]:
    x = 25 * np.arange(points)
    return x, np.exp(-x / x.max()) * np.arange(1, seeds + 1)[:, None]


def test_learning_curves_draw_the_mean_and_the_range_over_seeds(tmp_path: Path) -> None:
    path = tmp_path / "plots" / "curves.png"
    x, y = curve(20)
    figure = learning_curves(path, {"ours": (x, y), "theirs": (x, 2 * y)}, ylabel="error", title="Digits")
    assert imread(path).shape[:2] == (630, 1050)
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("student steps", "error", "Digits")
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["ours", "theirs"]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), np.stack([x, y.mean(0)], axis=1))
    band = axes.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose([band[:, 1].min(), band[:, 1].max()], [y.min(), y.max()])
    assert axes.lines[0].get_color() != axes.lines[1].get_color()


def test_missing_values_leave_gaps_without_warnings(tmp_path: Path) -> None:
    x, y = curve(10)
    y[0, 3], y[:, 5], y[1, 7] = np.nan, np.nan, -1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # what matplotlib calls is not ours to renew
        figure = learning_curves(tmp_path / "a.png", {"a": (x, y)}, ylabel="error", title="gaps")
        learning_curves(tmp_path / "b.png", {"b": (x, np.full_like(y, np.nan))}, ylabel="error", title="nothing")
        learning_curves(tmp_path / "c.png", {"c": (x[:0], y[:, :0])}, ylabel="error", title="no points")
        learning_curves(tmp_path / "d.png", {}, ylabel="error", title="no curves")
    drawn = figure.axes[0].lines[0].get_ydata()
    assert np.isnan(drawn[5])
    np.testing.assert_allclose(drawn[3], y[1:, 3].mean())
    np.testing.assert_allclose(drawn[7], y[[0, 2], 7].mean())  # a logarithm has no place for the negative one


def test_long_curves_are_smoothed_over_a_faint_one(tmp_path: Path) -> None:
    x, y = curve(50_000, seeds=1)
    y[:, ::100] = 1000  # spikes that a median does not see
    figure = learning_curves(tmp_path / "long.png", {"a": (x, y)}, ylabel="error", title="long", log_y=False)
    raw, smooth = figure.axes[0].lines
    assert raw.get_alpha() < 0.5
    assert raw.get_ydata().max() == 1000 and smooth.get_ydata().max() < 2
    assert len(smooth.get_xdata()) <= 2000
    assert smooth.get_xdata()[-1] == x[-1]
    assert figure.axes[0].get_yscale() == "linear"


def test_window_of_one_does_not_smooth(tmp_path: Path) -> None:
    x, y = curve(500)
    figure = learning_curves(tmp_path / "raw.png", {"a": (x, y)}, ylabel="error", title="raw", window=1)
    (line,) = figure.axes[0].lines
    np.testing.assert_allclose(line.get_ydata(), y.mean(0))


def test_running_median() -> None:
    y = np.array([1.0, 9.0, 2.0, np.nan, 4.0])
    np.testing.assert_array_equal(running_median(y, 3, np.arange(5)), [5, 2, 5.5, 3, 4])
    assert [default_window(points) for points in (1, 100, 1000)] == [1, 1, 21]


def test_shapes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    x, y = curve(10)
    with pytest.raises(ValueError, match=r"'a' has x \(10,\) and y \(10,\): give x \[R\] and y \[seeds, R\]"):
        learning_curves(tmp_path / "a.png", {"a": (x, y[0])}, ylabel="error", title="wrong")
    with pytest.raises(ValueError, match="'start' has shape"):
        loss_surfaces(tmp_path / "a.png", [("start", x)], title="wrong")
    with pytest.raises(ValueError, match="no surface"):
        loss_surfaces(tmp_path / "a.png", [], title="none")


def test_norms_are_logarithmic(tmp_path: Path) -> None:
    figure = norms(tmp_path / "norms.png", {"hypergradient": curve(10)}, title="norms", ylabel="norm of dE/dw")
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[0].get_ylabel() == "norm of dE/dw"


def test_loss_surfaces_have_the_right_class_on_the_first_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[np.ndarray, ...]] = []
    plain = Axes3D.plot_surface
    monkeypatch.setattr(Axes3D, "plot_surface", lambda *args, **kw: (drawn.append(args[1:]), plain(*args, **kw)))
    right, wrong = np.meshgrid(np.linspace(0, 1, 11), np.linspace(0, 1, 11), indexing="ij")
    surfaces = [("start", 0.7 * wrong - 0.3 * right), ("50 %", -2e4 * right), ("end", np.full((5, 5), np.nan))]
    path = tmp_path / "surfaces.png"
    figure = loss_surfaces(path, surfaces, title="DLN")
    assert imread(path).shape[:2] == (555, 1530)
    first, second, last = figure.axes
    assert (first.get_xlabel(), first.get_ylabel()) == ("right class", "wrong class")
    assert first.get_title() == "start\n-0.3 to 0.7"
    assert last.get_title() == "end\nnot finite"
    assert first.get_zlim()[1] < 1 < 1e4 < -second.get_zlim()[0]  # each has a range of its own
    x, y, z = (values.ravel() for values in drawn[0])
    assert (x[z.argmin()], y[z.argmin()]) == (1, 0)  # it is lowest where only the right class is predicted
    assert (x[z.argmax()], y[z.argmax()]) == (0, 1)


def test_costs_have_a_panel_each_and_one_legend(tmp_path: Path) -> None:
    path = tmp_path / "costs.png"
    panels = {
        "small": {"higher": [(25, 9.0), (1, 0.5)], "mixed": [(1, 0.2), (25, 4.0)]},
        "large": {"mixed": [(1, 2.0)], "save": [(1, 1.0)]},
    }
    marks = ("paper", [1, 75], [1.0, 76.7])
    labels = {"xlabel": "N", "ylabel": "seconds", "title": "Cost"}
    figure = costs(path, panels, dashed=["higher"], marks=marks, **labels)
    assert imread(path).shape[:2] == (600, 1500)
    assert [axes.get_title() for axes in figure.axes] == ["small", "large"]
    small, large = (axes.lines for axes in figure.axes)
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["mixed", "save", "higher", "paper"]  # the dashed after
    for lines in (small, large):
        np.testing.assert_allclose(lines[0].get_xydata(), [[1, 1], [75, 76.7]])
        assert lines[0].get_linestyle() == "None" and lines[0].get_color() == "0.6"
    drawn = {line.get_linestyle(): line for line in small[1:] if np.isfinite(line.get_ydata()).all()}
    np.testing.assert_allclose(drawn["-"].get_xydata(), [[1, 0.2], [25, 4]])
    np.testing.assert_allclose(drawn["--"].get_xydata(), [[1, 0.5], [25, 9]])  # in order of size
    assert small[1].get_color() == large[1].get_color() != large[2].get_color()
    with pytest.raises(ValueError, match="no cost"):
        costs(path, {}, dashed=[], marks=marks, **labels)


def test_ablation_draws_means_and_deviations(tmp_path: Path) -> None:
    lines = {"ours": [(1, 80.0, 2.0), (5, 85.0, 1.0), (75, 90.0, 0.5)], "published": [(5, 87.0, 0.0)]}
    figure = ablation(tmp_path / "a.png", lines, xlabel="unroll length", ylabel="accuracy, %", title="Digits")
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "unroll length", "accuracy, %")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "5", "75"]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [(1, 80), (5, 85), (75, 90)])
    (bars,) = axes.containers[0].lines[2]
    np.testing.assert_allclose([segment[:, 1] for segment in bars.get_segments()], [(78, 82), (84, 86), (89.5, 90.5)])


def test_ablation_over_names_stands_side_by_side(tmp_path: Path) -> None:
    lines = {"a": [("adam", 1.0, 0.1), ("sgd", 2.0, 0.1)], "b": [("sgd", 3.0, 0.1)]}
    (axes,) = ablation(tmp_path / "a.png", lines, xlabel="teacher", ylabel="y", title="t").axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["adam", "sgd"]
    assert axes.get_xscale() == "linear"
    first, second = axes.lines[0].get_xdata()[1], axes.lines[3].get_xdata()[0]
    assert first < 1 < second  # of one name, but not on top of each other
    with pytest.raises(ValueError, match="There is no result to draw"):
        ablation(tmp_path / "b.png", {}, xlabel="x", ylabel="y", title="t")


def test_curves_of_both_signs_over_decades(tmp_path):
    """All points are kept, zero and negative ones too, and the axis is linear within what is asked for."""
    x, y = np.arange(3), np.array([[-100.0, 0.0, 1000.0]])
    figure = learning_curves(tmp_path / "a.png", {"a": (x, y)}, ylabel="gain", title="signs", linear_within=0.1)
    (axes,) = figure.axes
    assert axes.get_yscale() == "symlog" and axes.yaxis.get_transform().linthresh == 0.1
    np.testing.assert_array_equal(axes.lines[-1].get_ydata(), y[0])


@pytest.mark.parametrize("count", [1, 3, 15])
def test_an_overview_has_room_for_its_legend(tmp_path: Path, count: int) -> None:
    """Below the curves and within the picture, however many names there are, and long ones."""
    curves = {f"generalized cross entropy + clean {i}": (np.arange(3.0), np.ones((2, 3))) for i in range(count)}
    figure = overview(tmp_path / "a.png", {"one": curves, "two": curves}, [("end", np.eye(5))], title="all")
    legend, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert len(figure.legends[0].get_texts()) == count and len(figure.axes) == 3
    assert whole.x0 <= legend.x0 and legend.x1 <= whole.x1 and whole.y0 <= legend.y0
    assert all(legend.y1 < axes.xaxis.label.get_window_extent().y0 for axes in figure.axes[:2])
    with pytest.raises(ValueError, match="nothing to draw"):
        overview(tmp_path / "b.png", {}, [], title="none")
