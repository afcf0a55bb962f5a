"""Pictures from made-up tables: labelled, read out, the same colours everywhere."""

import itertools
import subprocess
import sys

import frames
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from test_claims import SETTINGS

from marlhf import claims, figures, figures_sweeps, report
from marlhf.config import CONFIGS, read_yaml

SETTINGS = {**SETTINGS, "thresholds": [2.0]}
PAIRS = [("macro5", "token"), ("macro5", "token_matched")]
DRAW = {
    "updates": lambda t: figures.curves(t["evals"], thresholds={"rm_score": [2.0, 2.5]}),
    "seconds": lambda t: figures.curves(t["evals"], "seconds"),
    "frontier": lambda t: figures.frontier(t["evals"]),
    "final": lambda t: figures.final_distributions(t["densities"]),
    "steps": lambda t: figures.distributions_by_step(t["densities"], ("token", "macro5")),
    "norms": lambda t: figures.norms(t["metrics"]),
    "hacking": lambda t: figures.signs_of_hacking(t["evals"]),
    "forest": lambda t: figures.forest(t["comparisons"]),
    "along": lambda t: figures_sweeps.along(t["endpoints"], AXIS, "horizon", TITLES, "horizon"),
    "lines": lambda t: figures_sweeps.along(
        t["endpoints"], AXIS, "horizon", TITLES[:1], "horizon", over=50.0, by_line=True
    ),
    "size": lambda t: figures_sweeps.by_size(t["endpoints"], t["comparisons"], AXIS, TITLES[:1]),
    "groups": lambda t: figures_sweeps.curves_by_group(t["evals"].merge(AXIS[["arm", "line"]]),
                                                       "line"),
    "training": lambda t: figures_sweeps.training(t["metrics"], ("explained_variance", "kl")),
}  # fmt: skip
TITLES = ["mean RM score over training", "updates to RM score 2.0", "final true score"]
AXIS = pd.DataFrame(
    [
        ("token", "token", "token PPO", 19.5, 40_000),
        ("macro5", "macro5", "MA-PPO, n = 5", 97.5, 40_000),
        ("whole", "whole", "MA-PPO, n = ∞", np.inf, 400_000),
        ("token_matched", "token", "token PPO", 97.5, 400_000),
        ("token_mc", "token", "token PPO", np.inf, 400_000),
    ],
    columns=["arm", "line_arm", "line", "horizon", "parameters"],
)


@pytest.fixture(scope="module")
def tables():
    return report.tables(frames.frames(chains=2, every=22, prompts=16), SETTINGS, PAIRS)


@pytest.mark.parametrize("name", DRAW)
def test_every_picture_is_labelled_small_and_read_out(name, tables, tmp_path):
    picture = DRAW[name](tables)
    for axis in picture.figure.axes:
        bottom = axis.get_subplotspec().is_last_row() or name != "steps"
        assert axis.get_xlabel() or not bottom
        assert all(t.get_fontsize() >= 11 for t in axis.get_xticklabels())
    assert "MA-PPO, n = 5" in picture.alt
    assert "\n" not in picture.alt
    path = picture.save(tmp_path / "made" / f"{name}.png")
    assert path.stat().st_size < 500_000
    with Image.open(path) as image:
        assert image.info["Description"] == picture.alt
        assert image.width == 1350


def test_real_data_has_no_panel_for_the_truth(tables):
    evals = tables["evals"].assign(true_score=float("nan"))
    assert len(figures.curves(evals).figure.axes) == 1


def test_a_single_chain_has_a_line_and_no_band(tables):
    evals = tables["evals"]
    one = evals[(evals["chain"] == 0) & (evals["arm"] == "token")]
    band = figures.band(one, "rm_score")
    assert list(band["mean"]) == list(one["rm_score"])
    assert band["low"].isna().all()
    assert figures.curves(evals[evals["chain"] == 0]).alt


# Machado et al. 2009, severity 1, on linear RGB
SIGHT = {
    "full": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
FILES = [p for p in (CONFIGS / "experiments").glob("*.yaml") if not p.stem.startswith("pilot")]


def lab(colour, sight="full"):
    """CIELAB of a colour as seen."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(SIGHT[sight]) @ linear, 0, 1)
    x, y, z = np.cbrt(np.maximum(TO_XYZ @ seen / [0.9505, 1.0, 1.089], 1e-4))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_arms_of_an_experiment_are_told_apart(path):
    known = list(read_yaml(path)["arms"])
    assert set(known) <= set(figures.STYLES)
    styles = [figures.style(arm, known) for arm in known]
    assert len({marker for _, _, marker in styles}) >= min(len(known), 9)
    assert len({(dash, marker) for _, dash, marker in styles}) == len(known)
    for sight, (a, b) in itertools.product(SIGHT, itertools.combinations(styles, 2)):
        assert np.linalg.norm(lab(a[0], sight) - lab(b[0], sight)) > 14, (sight, a, b)


@pytest.mark.parametrize(
    "sweep",
    [
        ("macro3", "macro5", "macro10", "whole"),
        ("macro5_80", "macro5_90", "macro5", "macro5_99", "macro5_mc"),
        ("token_80", "token_90", "token"),
        ("token_mc", "token_matched", "token_99", "token"),
    ],
)
def test_sweeps_are_ordered_shades(sweep):
    shades = [lab(figures.STYLES[arm][0])[0] for arm in sweep]
    assert all(a - b > 10 for a, b in itertools.pairwise(shades))


def test_unknown_arms_have_spare_styles():
    known = ["token", "n4", "n8", "n16", "n32"]
    styles = [figures.style(arm, known) for arm in known]
    assert len({colour for colour, _, _ in styles}) == len(known)
    assert len({marker for _, _, marker in styles}) == len(known)


def test_filled_marks_are_clear_differences(tables):
    table = tables["comparisons"].head(1)
    table = table.assign(difference=1.0, low=0.5, high=1.5)
    filled = figures.forest(table).figure.axes[0].lines[1]
    open_ = figures.forest(table.assign(low=-0.5)).figure.axes[0].lines[1]
    assert filled.get_markerfacecolor() != "white"
    assert open_.get_markerfacecolor() == "white"
    assert claims.verdict_sentence(table.assign(low=-0.5).iloc[0]).count("cannot tell") == 1


def test_drawing_needs_no_model_library():
    loaded = "sys.exit('torch' in sys.modules or 'pyplot' in sys.modules)"
    code = f"import sys, marlhf.figures_sweeps; {loaded}"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_endpoints_along_an_axis_are_drawn_where_they_are(tables):
    picture = figures_sweeps.along(
        tables["endpoints"], AXIS, "horizon", TITLES[:1], "horizon / T", over=50.0, by_line=True
    )
    (axis,) = picture.figure.axes
    mean = tables["arms"].set_index(["arm", "endpoint"])["mean"]
    bars = {(round(x, 6), round(y, 6)) for c in axis.containers for x, y in [_mark(c)]}
    end = 97.5 / 50 * figures_sweeps.BEYOND  # infinity, to the right of the largest
    for arm, x in (("token", 19.5 / 50), ("macro5", 97.5 / 50), ("token_mc", end)):
        assert (round(x, 6), round(mean[arm, TITLES[0]], 6)) in bars
    assert axis.get_xscale() == "log"
    assert "∞" in [text.get_text() for text in axis.get_xticklabels()]
    token = next(line for line in axis.lines if line.get_color() == "#000000")
    assert list(token.get_xdata()) == pytest.approx([19.5 / 50, 97.5 / 50, end])
    names = [text.get_text() for text in picture.figure.legends[0].get_texts()]
    assert names == ["token PPO", "MA-PPO, n = 5", "MA-PPO, n = ∞"]


def _mark(container):
    (x,), (y,) = container.lines[0].get_data()
    return x, y


def test_a_missed_threshold_is_read_out(tables):
    values = tables["endpoints"].copy()
    one = (values["arm"] == "whole") & (values["endpoint"] == TITLES[1])
    values.loc[one, "censored"] = True
    picture = figures_sweeps.along(values, AXIS, "horizon", TITLES, "horizon")
    assert picture.alt.count("(2 missed)") == 1


def test_gains_by_size_are_filled_where_they_are_clear(tables):
    compared = tables["comparisons"].assign(low=0.1, difference=0.2, high=0.3)
    for low, colour in ((0.1, "#D55E00"), (-0.1, "white")):
        picture = figures_sweeps.by_size(
            tables["endpoints"], compared.assign(low=low), AXIS, TITLES[:1]
        )
        (container, *_) = picture.figure.axes[1].containers
        assert container.lines[0].get_markerfacecolor() == colour
    assert "40k" in [text.get_text() for text in picture.figure.axes[1].get_xticklabels()]


def test_groups_share_a_scale_and_real_data_has_no_row_for_the_truth(tables):
    evals = tables["evals"].merge(AXIS[["arm", "line"]])
    axes = figures_sweeps.curves_by_group(evals, "line").figure.axes
    assert len(axes) == 6
    assert len({axis.get_ylim() for axis in axes[:3]}) == 1
    real = evals.assign(true_score=float("nan"))
    assert len(figures_sweeps.curves_by_group(real, "line").figure.axes) == 3
