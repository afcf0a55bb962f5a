"""Tables of program synthesis on made-up samples, expected numbers worked out by hand."""

import pandas as pd
import pytest

from marlhf import figures, programs

RIGHT = {  # of five samples: arm -> chain -> problem
    "sft": [{"p": 0, "q": 1}, {"p": 1, "q": 2}],
    "token": [{"p": 1, "q": 2}, {"p": 2, "q": 3}],
    "macro10": [{"p": 2, "q": 4}, {"p": 4, "q": 5}],
}
LEVEL = {"p": "introductory", "q": "competition"}


@pytest.fixture
def repeated():
    rows = []
    for arm, chains in RIGHT.items():
        for chain, counts in enumerate(chains):
            for name, right in counts.items():
                for sample in range(5):
                    score = 1.0 if sample < right else 0.57
                    head = {"arm": arm, "label": arm.upper(), "chain": chain, "prompt_id": name}
                    head |= {"difficulty": LEVEL[name], "sample": sample, "temperature": 1.0}
                    rows.append(head | {"true_score": score})
    return pd.DataFrame(rows)


def one(table, **where):
    for key, value in where.items():
        table = table[table[key] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_pass_rates_by_hand(repeated):
    rates = programs.pass_rates(repeated)
    assert one(rates, arm="macro10", chain=0, k=1, difficulty="introductory")["value"] == 0.4
    assert one(rates, arm="macro10", chain=0, k=1, difficulty="all")["value"] == pytest.approx(0.6)
    assert one(rates, arm="sft", chain=0, k=5, difficulty="introductory")["value"] == 0
    assert one(rates, arm="sft", chain=0, k=5, difficulty="all")["value"] == 0.5
    two = programs.pass_rates(repeated, (2,))
    assert one(two, arm="macro10", chain=0, difficulty="introductory")["value"] == pytest.approx(
        1 - 3 / 10
    )


def test_pass_rates_as_endpoints(repeated):
    values = programs.endpoints(programs.pass_rates(repeated))
    assert set(values["endpoint"]) == {"pass@1", "pass@5"} and set(values["unit"]) == {"share"}
    assert one(values, arm="macro10", chain=1, endpoint="pass@1")["value"] == pytest.approx(0.9)
    assert len(values) == 2 * 2 * 3  # k, chains, arms: all difficulties together


def test_table3_pairs_arms_within_chains(repeated):
    table = programs.table3(programs.pass_rates(repeated), "token")
    row = one(table, arm="macro10", difficulty="all", k=1)
    assert row["mean"] == pytest.approx((0.6 + 0.9) / 2)
    assert row["difference"] == pytest.approx((0.3 + 0.4) / 2)
    assert row["difference_low"] < row["difference"] < row["difference_high"]
    assert one(table, arm="token", difficulty="all", k=1)["difference"] == 0
    assert list(table["difficulty"].unique()) == ["introductory", "competition", "all"]
    wide = programs.table3_wide(table)
    assert list(wide.columns) == ["difficulty", "metric", "SFT", "TOKEN", "MACRO10"]
    assert wide.iloc[-2]["MACRO10"].startswith("75.0 ± ")


def test_what_cannot_be_compared_is_an_error(repeated):
    with pytest.raises(ValueError, match="one temperature"):
        programs.pass_rates(pd.concat([repeated, repeated.assign(temperature=0.5)]))
    with pytest.raises(ValueError, match="k = 6"):
        programs.pass_rates(repeated, (6,))
    fewer = repeated[(repeated["arm"] != "macro10") | (repeated["chain"] == 0)]
    with pytest.raises(ValueError, match="different chains"):
        programs.table3(programs.pass_rates(fewer), "token")


def test_the_words_follow_the_interval(repeated):
    table = programs.table3(programs.pass_rates(repeated), "token")
    pairs = [("macro10", "token"), ("macro10", "token_matched")]
    unsure = programs.sentences(table, pairs, "token")
    assert len(unsure) == 2
    assert "not told apart, difference 35.0 points" in unsure[0]
    assert "higher" in programs.sentences(table.assign(difference_low=0.1), pairs, "token")[0]


def test_gates(repeated):
    table = programs.gates(programs.pass_rates(repeated))
    assert table["passes"].all()
    assert one(table, gate="SFT pass@1 on held-out problems")["mean"] == pytest.approx(0.2)
    assert one(table, gate="pass@1 gained over PPO")["mean"] == pytest.approx(0.375)
    worse = repeated.assign(true_score=repeated["true_score"].where(repeated["arm"] == "sft", 0.5))
    table = programs.gates(programs.pass_rates(worse))
    assert not one(table, gate="pass@1 gained over PPO")["passes"]


def test_the_picture_shows_every_difficulty_and_says_the_whole(repeated):
    table = programs.table3(programs.pass_rates(repeated), "token")
    picture = figures.pass_rates(table)
    assert len(picture.figure.axes) == 2
    labels = [t.get_text() for t in picture.figure.axes[0].get_xticklabels()]
    assert labels == ["intro.", "competition", "all"]
    whole = one(table, difficulty="all", k=1, arm="macro10")["mean"]
    assert f"pass@1 MACRO10 {100 * whole:.1f}%" in picture.alt
