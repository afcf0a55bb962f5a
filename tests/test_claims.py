"""Tables of endpoints, comparisons and gates, and the sentences that word them."""

import math

import frames
import numpy as np
import pandas as pd
import pytest

from marlhf import claims, stats

SETTINGS = {
    "score": "rm_score",
    "primary": "auc",
    "others": ["updates_to_threshold", "seconds_to_threshold", "final"],
    "thresholds": [1.0],
}
MAIN = "mean RM score over training"


def curve(arm, chain, scores, seconds=1.0, kl=None):
    """Evaluations at updates 0, 10, 20, ... of an arm."""
    updates = 10 * np.arange(len(scores))
    return pd.DataFrame({
        "arm": arm, "label": arm.upper(), "chain": chain, "update": updates,
        "seconds": updates * seconds, "rm_score": scores, "true_score": np.nan,
        "kl": updates if kl is None else kl,
    })  # fmt: skip


@pytest.fixture
def two_arms():
    """b reaches 1.0 at update 15 in both chains, a at 5 and 10; c never does."""
    return pd.concat([
        curve("a", 0, [0, 2, 2]), curve("a", 1, [0, 1, 1]),
        curve("b", 0, [0, 0, 2]), curve("b", 1, [0, 0, 2]),
        curve("c", 0, [0, 0, 0], seconds=2.0), curve("c", 1, [0, 0, 0], seconds=2.0),
    ])  # fmt: skip


def value(values, arm, endpoint, chain=0):
    picked = values[(values["arm"] == arm) & (values["endpoint"] == endpoint)]
    return picked[picked["chain"] == chain].iloc[0]


def test_endpoints_by_hand(two_arms):
    values = claims.endpoints(two_arms, SETTINGS)
    assert value(values, "a", MAIN)["value"] == pytest.approx(1.5)  # (0+2)/2, (2+2)/2
    assert value(values, "a", "updates to RM score 1.0")["value"] == pytest.approx(5)
    assert value(values, "a", "updates to RM score 1.0", 1)["value"] == pytest.approx(10)
    assert value(values, "b", "seconds to RM score 1.0")["value"] == pytest.approx(15)
    assert value(values, "b", "final RM score")["value"] == 2
    missed = value(values, "c", "updates to RM score 1.0")
    assert missed["value"] == 20
    assert missed["censored"]
    assert not values["endpoint"].str.contains("true").any()


def test_missed_seconds_count_as_the_shortest_training_time(two_arms):
    values = claims.endpoints(two_arms, SETTINGS)
    assert value(values, "c", "seconds to RM score 1.0")["value"] == 20  # c trained for 40 s


def test_score_at_equal_kl():
    evals = pd.concat([
        curve("a", 0, [0.0, 1, 2], kl=[0.0, 2, 4]), curve("b", 0, [0.0, 1, 2], kl=[0.0, 1, 1.5]),
    ])  # fmt: skip
    values = claims.endpoints(evals, SETTINGS)
    assert value(values, "b", "RM score at equal KL")["value"] == pytest.approx(2)
    assert value(values, "a", "RM score at equal KL")["value"] == pytest.approx(0.75)


def test_unknown_endpoint_is_named(two_arms):
    with pytest.raises(ValueError, match="'best'.*auc"):
        claims.endpoints(two_arms, {**SETTINGS, "primary": "best"})


def test_positive_is_better_for_the_arm(two_arms):
    table = claims.compare(claims.endpoints(two_arms, SETTINGS), [("a", "b")]).set_index("endpoint")
    expected = stats.paired_interval([1.5, 0.75], [0.5, 0.5])
    assert table.loc[MAIN, "difference"] == pytest.approx(expected.mean)
    assert table.loc[MAIN, "high"] == pytest.approx(expected.high)
    sooner = table.loc["updates to RM score 1.0"]
    assert sooner["difference"] == pytest.approx((10 + 5) / 2)
    assert sooner["times"] == pytest.approx(math.sqrt(3 * 1.5))


def test_arms_with_other_chains_are_refused(two_arms):
    values = claims.endpoints(two_arms, SETTINGS)
    values = values[(values["arm"] != "b") | (values["chain"] == 0)]
    with pytest.raises(ValueError, match="same chains"):
        claims.compare(values, [("a", "b")])


def row(low, high, unit="score", missed=0):
    mean = (low + high) / 2
    return {
        "label": "A", "reference_label": "B", "endpoint": "final RM score", "unit": unit,
        "difference": mean, "low": low, "high": high, "chains": 6, "missed": missed,
        "reference_missed": 0, "times": math.nan, "times_low": math.nan, "times_high": math.nan,
    }  # fmt: skip


@pytest.mark.parametrize(
    "low, high, unit, words",
    [
        (0.1, 0.3, "score", "A is 0.2 higher than B"),
        (-0.3, -0.1, "score", "A is 0.2 lower than B"),
        (-0.1, 0.3, "score", "cannot tell A from B (0.1 higher)"),
        (2, 4, "updates", "A is 3 updates sooner than B"),
        (-4, -2, "updates", "A is 3 updates later than B"),
        (-4, 2, "seconds", "cannot tell A from B (1 seconds later)"),
    ],
)
def test_the_interval_gives_the_verdict(low, high, unit, words):
    text = claims.verdict_sentence(row(low, high, unit))
    assert words in text
    assert "6 chains" in text
    assert "Missed" not in text


def test_missed_thresholds_are_said():
    text = claims.verdict_sentence(row(2, 4, "updates", missed=2))
    assert "Missed by 2 of 6 with A" in text


def test_a_single_chain_gives_no_verdict():
    text = claims.verdict_sentence({**row(-math.inf, math.inf), "difference": 1.0, "chains": 1})
    assert "cannot tell" in text
    assert "no interval" in text


def test_power_is_that_of_stats():
    values = claims.endpoints(frames.evals(), SETTINGS)
    table = claims.power(values, [("macro5", "token")])
    one = values[values["endpoint"] == MAIN]
    a, b = (one[one["arm"] == arm]["value"].to_numpy() for arm in ("macro5", "token"))
    spread = np.std(a - b, ddof=1)
    found = table[table["endpoint"] == MAIN].iloc[0]
    assert found["sd"] == pytest.approx(spread)
    assert found["n=12"] == pytest.approx(stats.smallest_detectable(spread, 12))
    assert len(claims.power_sentences(table, MAIN)) == 1


def test_gates_name_what_fails():
    table = claims.gates(frames.evals(), frames.manifests())
    assert table["passes"].all()
    assert "passes all" in claims.gate_sentence(table)
    table = claims.gates(frames.evals(), frames.manifests(accuracy=(0.70, 0.79)))
    failed = table[~table["passes"]]
    assert list(failed["gate"]) == ["RM pair accuracy, held out"]
    assert failed["worst"].item() == pytest.approx(0.70)
    assert failed["chains_passing"].item() == 1
    assert "RM pair accuracy" in claims.gate_sentence(table)


def test_a_gate_without_a_number_fails():
    """A scorer that gives every sample the same score correlates with nothing."""
    manifests = frames.manifests()
    first_rm = manifests.index[manifests["stage"] == "rm"][0]
    manifests.loc[first_rm, "summary.truth_correlation"] = np.nan
    table = claims.gates(frames.evals(), manifests)
    failed = table[~table["passes"]].iloc[0]
    assert failed["gate"] == "RM and true score, correlation on SFT samples"
    assert math.isnan(failed["worst"])
    assert failed["chains_passing"] == 5


def test_what_claims_read_over_training():
    rows = [{"arm": "a", "label": "A", "chain": 0, "update": u, "seconds": 3.0 * u}
            | dict.fromkeys(claims.NORMS.values(), float(u)) for u in (1, 2, 6)]  # fmt: skip
    values = claims.over_training(pd.DataFrame(rows))
    assert set(values["endpoint"]) == {*claims.NORMS, claims.COST}
    assert value(values, "a", "root mean square of Q values per token")["value"] == 3
    assert value(values, "a", "seconds per update")["value"] == 3
    assert not values["censored"].any()


def test_norms_as_multiples_of_the_reference():
    (line,) = claims.norm_sentences(frames.metrics(), [("macro5", "token")])
    assert "over macro steps 0.44 times" in line  # 1 / sqrt(5), and a little
    assert "per token 0.9" in line
