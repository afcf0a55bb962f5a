"""What stands beside a score, the scores by temperature, and their pictures; numbers by hand."""

import math

import frames
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from marlhf import figures_samples, quality, report

PAIRS = [("macro5", "token")]


def made(temperatures=(0.0, 0.8), chains=2, truth=True):
    """A row an arm, chain and temperature: RM score 1 + chain for token PPO, 0.5 more for MA-PPO,
    temperature less for both; the SFT model at 0."""
    rows = []
    for arm, base in {"sft": 0.0, "token": 1.0, "macro5": 1.5}.items():
        label = "SFT" if arm == "sft" else frames.ARMS[arm][0]
        for chain in range(chains):
            for t in temperatures:
                rows.append({
                    "arm": arm, "label": label, "chain": chain, "temperature": t,
                    "rm_score": base + chain - t, "true_score": 3 + base if truth else math.nan,
                    "kl": 4.0 * base, "length": 50.0 + chain, "finished": 1.0, "distinct1": 0.01,
                    "distinct2": 0.03, "ref_perplexity": 1.3 + t,
                })  # fmt: skip
    return pd.DataFrame(rows)


def test_every_measure_of_every_arm_with_its_interval():
    table = quality.quality_table({"quality": made(temperatures=[0.8])})
    assert list(table.endpoint.unique()) == list(quality.TITLES.values())
    assert list(table.label.unique()) == ["SFT", *(frames.ARMS[a][0] for a in ("token", "macro5"))]
    row = table[(table.arm == "macro5") & (table.endpoint == "RM score")].iloc[0]
    # chains 0.7 and 1.7: mean 1.2; t of one degree of freedom 12.706, s / sqrt(2) = 0.5
    assert row["mean"] == pytest.approx(1.2)
    assert row["high"] - row["mean"] == pytest.approx(12.706 * 0.5, rel=1e-4)
    shown = report.arm_table(table).set_index("endpoint")
    assert shown.loc["perplexity under the reference", "SFT"] == "2.1"


def test_rounding_is_no_divergence():
    frame = made(temperatures=[0.8])
    frame["kl"] = frame["kl"].where(frame["arm"] != "sft", [-4e-7, 3e-7] * 3)
    shown = report.arm_table(quality.quality_table({"quality": frame})).set_index("endpoint")
    assert shown.loc[quality.TITLES["kl"], "SFT"] == "0"


def test_without_a_true_score_there_is_no_row_of_it():
    table = quality.quality_table({"quality": made(truth=False)})
    assert not table.endpoint.str.contains("true score").any()
    assert "length" in " ".join(table.endpoint)
    values = quality.temperature_endpoints(made(truth=False))
    assert not values.endpoint.str.contains("true score").any()


def test_several_temperatures_have_rows_of_their_own():
    table = quality.quality_table({"quality": made()})
    row = table[(table.arm == "token") & (table.endpoint == "RM score at temperature 0.8")]
    assert row["mean"].tolist() == pytest.approx([0.7])
    assert len(table) == 3 * 2 * len(quality.TITLES)


def test_scores_at_each_temperature_and_their_mean():
    values = quality.temperature_endpoints(made(temperatures=(0.0, 0.2, 1.0)))
    token = values[(values.arm == "token") & (values.chain == 1)].set_index("endpoint")["value"]
    assert token["RM score at temperature 0"] == 2.0
    assert token["RM score at temperature 0.2"] == 1.8
    assert token["RM score, mean over temperatures"] == pytest.approx(2 - 0.4)
    assert token["true score, mean over temperatures"] == 4.0
    assert len(token) == 2 * (3 + 1)


def test_tables_compare_the_endpoints_asked_for_in_their_order():
    values = quality.temperature_endpoints(made())
    wanted = ["true score, mean over temperatures", "RM score at temperature 0"]
    runs = pd.DataFrame({"stage": ["eval"], "config": ["{}"], "minutes": [1.0]})
    tables = quality.sample_tables(values, runs, PAIRS, wanted)
    assert tables["comparisons"]["endpoint"].tolist() == wanted
    assert tables["comparisons"]["difference"].tolist() == [0.5, 0.5]
    assert set(tables["arms"].endpoint) == set(values.endpoint)
    assert list(tables["runs"]) == ["stage", "minutes"]
    one = quality.sample_tables(values[values.chain == 0], runs, PAIRS, wanted)
    assert "power" in tables and "power" not in one


@pytest.mark.parametrize("measures", [("rm_score",), ("length", "distinct2", "finished")])
def test_the_picture_by_temperature(measures, tmp_path):
    picture = figures_samples.by_temperature(made(temperatures=(0.0, 0.4, 0.8)), measures)
    assert len(picture.figure.axes) == len(measures)
    lines = picture.figure.axes[0].lines
    assert [line.get_label() for line in lines] == ["SFT", "token PPO, λ .95", "MA-PPO, n = 5"]
    assert list(lines[1].get_xdata()) == [0.0, 0.4, 0.8]
    expected = [1.5, 1.1, 0.7] if measures == ("rm_score",) else [50.5] * 3
    np.testing.assert_allclose(lines[1].get_ydata(), expected)
    if measures == ("rm_score",):
        assert "At 0 and 0.8: RM score (SFT: 0 ± 1): SFT 0.5 and −0.3, " in picture.alt
    path = picture.save(tmp_path / "p.png")
    with Image.open(path) as image:
        assert image.info["Description"] == picture.alt


def test_one_chain_has_a_line_and_no_band():
    one = made(chains=1)
    assert not figures_samples.by_temperature(one).figure.axes[0].collections
    assert figures_samples.by_temperature(made()).figure.axes[0].collections
