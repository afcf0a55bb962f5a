"""Pictures from made-up tables: labelled, read out, the same colours everywhere."""

import subprocess
import sys

import frames
import pytest
from PIL import Image
from test_claims import SETTINGS

from marlhf import claims, figures, report

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
}


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


def test_arms_are_told_apart_and_keep_their_style():
    known = [*figures.STYLES, "n3", "n10", "perplexity"]
    styles = [figures.style(arm, known) for arm in known]
    assert len({colour for colour, _, _ in styles}) == len(known)
    assert len({marker for _, _, marker in styles}) == len(known)
    assert figures.style("macro5", ["macro5"]) == figures.style("macro5", known)


def test_filled_marks_are_clear_differences(tables):
    table = tables["comparisons"].head(1)
    table = table.assign(difference=1.0, low=0.5, high=1.5)
    filled = figures.forest(table).figure.axes[0].lines[1]
    open_ = figures.forest(table.assign(low=-0.5)).figure.axes[0].lines[1]
    assert filled.get_markerfacecolor() != "white"
    assert open_.get_markerfacecolor() == "white"
    assert claims.verdict_sentence(table.assign(low=-0.5).iloc[0]).count("cannot tell") == 1


def test_drawing_needs_no_model_library():
    code = "import sys, marlhf.report; sys.exit('torch' in sys.modules or 'pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
