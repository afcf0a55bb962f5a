"""The paper's numbers beside ours: Table 5's deviations, Table 2's gains, and other measures."""

import frames
import pandas as pd
import pytest
from test_claims import SETTINGS

from marlhf import claims, paper, report

PAIRS = [("macro5", "token"), ("macro5", "token_matched"), ("token_matched", "token")]


@pytest.fixture(scope="module")
def made():
    given = frames.frames(chains=3, every=22, prompts=16)
    return report.tables(given, {**SETTINGS, "thresholds": [2.0]}, PAIRS)


def test_presets_of_the_papers_models_do_not_deviate():
    assert paper.deviations().empty
    table = paper.table5().set_index("setting")
    assert table.loc["sft.batch", "gemma-2b"] == "tldr 512, hh 512, webgpt 64"
    assert table.loc["ppo.kl_coef", "gemma-2-27b"] == "0.1"
    assert table.loc["rm.lr", "codegemma-2b"] == ""


def test_a_preset_that_deviates_is_found(monkeypatch):
    load = paper.load_config
    monkeypatch.setattr(paper, "load_config", lambda name: load(name, "ppo.lam=0.9"))
    found = paper.deviations()
    assert set(found["setting"]) == {"ppo.lam"} and len(found) == len(paper.table5_models())
    assert (found["paper"][0], found["ours"][0]) == ("0.95", "0.9")


@pytest.mark.parametrize(
    "theirs, ours, words",
    [(512, 64, "×0.125"), (5e-5, 5e-3, "×100"), (0.05, 0.05, ""), ("hub", "embedded", "differs"),
     (0.0, 0.1, "differs"), (50, None, "differs"), (None, 110, "not in Table 5"), (200, 0, "×0")],
)  # fmt: skip
def test_a_deviation_in_words(theirs, ours, words):
    assert paper.deviation(theirs, ours) == words


def test_ours_stand_beside_the_papers():
    table = paper.beside("gemma-2b", paper.presets_at("tiny", paper.TEXT_TASKS))
    row = table.set_index("setting").loc
    assert row["ppo.lam", "deviation"] == "" and row["ppo.macro.n", "tldr-tiny"] == "5"
    assert row["ppo.lr", "deviation"] == "tldr ×80, hh ×40, webgpt ×40"
    assert row["ppo.updates", "deviation"] == "not in Table 5"
    code = paper.beside("codegemma-2b", paper.presets_at("tiny", paper.CODE_TASKS))
    assert not code["setting"].str.startswith("rm.").any()
    assert paper.presets_at("gemma-2b", ["tldr", "apps"]) == {"tldr": "tldr-gemma-2b"}


def test_gains_are_the_comparisons_with_their_share(made):
    primary = claims.primary(SETTINGS)
    table = paper.gains({"tldr": made}, {"tldr": primary})
    assert list(table["reference"]) == ["token"] * 2 + ["token_matched"] * 2
    row = table[table["endpoint"] == "final RM score"].iloc[0]
    ends = made["endpoints"].query("endpoint == 'final RM score'").set_index(["arm", "chain"])
    a, b = ends.loc["macro5", "value"], ends.loc["token", "value"]
    assert row["difference"] == pytest.approx((a - b).mean())
    assert row["share"] == pytest.approx(((a - b) / b).mean())
    wide = paper.gains_wide(table)
    theirs = wide["paper, %"][wide["endpoint"] == "final RM score"]
    assert list(theirs) == ["Gemma-2B +68, Gemma-7B +30", ""]
    picture = paper.gains_picture(table[table["endpoint"] == primary])
    assert len(picture.figure.axes) == 1
    assert "tldr over token PPO, λ = 0.95: " in picture.alt and "λ^(1/n)" in picture.alt


def test_what_stands_beside_a_score():
    given = frames.frames(chains=2, every=55, prompts=8)
    table = paper.quality(given)
    assert list(table.columns) == ["arm", "label", "chain", "rm_score", "true_score", "kl",
                                   "length", "finished", "distinct2"]  # fmt: skip
    assert len(table) == 2 * (1 + len(frames.ARMS))  # SFT's once a chain
    sampled = table.assign(ref_perplexity=1.5, temperature=0.8)
    again = paper.quality({**given, "quality": sampled})
    assert (again["ref_perplexity"] == 1.5).all() and "temperature" not in again
    bare = table.drop(columns="rm_score").assign(arm="token", label="token")
    wide = paper.quality_wide({"tldr": again, "apps": bare})
    assert list(wide.columns)[:3] == ["task", "policy", "RM score"] and "perplexity" in wide
    assert wide["RM score"].iloc[-1] == "" and wide["policy"].iloc[0] == "SFT"
    assert isinstance(wide, pd.DataFrame) and not wide.isna().any().any()
