"""What an experiment leaves under results/, and the README's block."""

import json
from types import SimpleNamespace

import frames
import pandas as pd
import pytest
from test_claims import SETTINGS

from marlhf import claims, figures, report

PAIRS = [("macro5", "token"), ("token_matched", "token")]


@pytest.fixture(scope="module")
def made():
    return report.tables(
        frames.frames(chains=3, every=22, prompts=16), {**SETTINGS, "thresholds": [2.0, 2.5]}, PAIRS
    )


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    monkeypatch.setenv("MARLHF_RESULTS", str(tmp_path / "results"))
    folder = report.results_folder("fig02_tldr", "tiny")
    report.write_tables(folder, made)
    figures.curves(made["evals"]).save(folder / "fig02_updates.png")
    experiment = SimpleNamespace(
        name="fig02_tldr", title="a title", scale="tiny", task="tldr", seeds=(0, 1, 2),
        arms=figures.arms(made["evals"]), endpoints=SETTINGS,
    )  # fmt: skip
    report.finish(folder, report.facts(experiment, made))
    return folder


def test_tables_survive_the_disk(made, folder):
    read = report.read_tables(folder)
    assert set(read) == set(made)
    for name in ("evals", "comparisons", "power"):
        pd.testing.assert_frame_equal(
            read[name], made[name].reset_index(drop=True), check_dtype=False, rtol=1e-4
        )


def test_claims_find_more_endpoints_than_are_compared(made):
    extra = {*claims.NORMS, claims.COST}
    assert extra < set(made["endpoints"]["endpoint"])
    for name in ("arms", "comparisons", "power"):
        assert not extra & set(made[name]["endpoint"])


def test_one_chain_and_no_truth_leave_out_what_they_cannot_have():
    given = frames.frames(chains=1, every=22, prompts=8)
    for name in ("evals", "samples"):
        given[name]["true_score"] = float("nan")
    tables = report.tables(given, SETTINGS, PAIRS)
    assert "power" not in tables
    assert "gates" not in tables
    assert set(tables["densities"]["measure"]) == {"rm_score"}
    assert "true" not in report.markdown(report.wide(tables["samples"]))


def test_densities_integrate_to_one_and_keep_first_and_last(made):
    table = made["densities"]
    assert table["update"].min() == 0
    assert table["update"].max() == 110
    for _, group in table.groupby(["arm", "update", "measure"]):
        step = group["score"].diff().iloc[1]
        assert group["density"].sum() * step == pytest.approx(1, abs=0.02)


def test_samples_stand_side_by_side(made):
    table = report.wide(made["samples"])
    assert list(table.columns)[:2] == ["prompt", "SFT"]
    assert len(table) == 3
    assert "after 0 updates" in table["SFT"][0]
    assert "after 110 updates" in table["MA-PPO, n = 5"][0]


def test_means_have_the_digits_of_their_interval():
    arms = pd.DataFrame([
        {"arm": "a", "label": "A", "endpoint": "e", "mean": 28.04, "low": 25.6, "high": 30.4,
         "missed": 0},
        {"arm": "b", "label": "B", "endpoint": "e", "mean": 2.0, "low": float("-inf"),
         "high": float("inf"), "missed": 1},
    ])  # fmt: skip
    assert report.arm_table(arms).to_dict("records") == [
        {"endpoint": "e", "A": "28.0 ± 2.4", "B": "2 (1 missed)"}
    ]


def test_markdown_cannot_be_broken_by_a_cell():
    table = pd.DataFrame({"a": ["x|y\n  z"], "b": [float("nan")]})
    assert report.markdown(table).splitlines()[-1] == "| x\\|y<br>&nbsp;&nbsp;z |  |"


def test_a_task_that_scores_itself_has_no_score_of_a_reward_model():
    given = frames.frames(chains=2, every=22, prompts=8)
    given["runs"] = given["runs"][given["runs"]["stage"] != "rm"]
    made = report.tables(given, {"score": "true_score", "primary": "auc"}, PAIRS)
    assert made["evals"]["rm_score"].isna().all() and "gates" not in made
    assert set(made["densities"]["measure"]) == {"true_score"}
    assert "RM" not in report.markdown(report.wide(made["samples"]))
    assert len(figures.curves(made["evals"]).figure.axes) == 1


def test_the_summary_comes_last(made, folder):
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["chains"] == 3
    assert "MA-PPO, n = 5" in summary["pictures"]["fig02_updates.png"]
    assert len(summary["verdicts"]) == len(made["comparisons"])
    report.results_folder("fig02_tldr", "tiny")  # a new run begins
    assert not (folder / "summary.json").exists()


def test_table_2_sets_ours_beside_the_papers(made):
    table = report.table2({"tldr": made, "unheard": made})
    assert list(table["task"]) == ["tldr", "unheard"]
    assert table["paper, PPO → MA-PPO"][0] == "Gemma-2B: 0.84 → 1.41, Gemma-7B: 1.9 → 2.47"
    assert table["paper, PPO → MA-PPO"][1] == ""
    row = made["comparisons"].query("endpoint == 'final RM score' and arm == 'macro5'").iloc[0]
    assert table["difference"][0].startswith(report.number(row["difference"]) + " [")
    assert table["MA-PPO"][0].endswith("(n = 5)")
