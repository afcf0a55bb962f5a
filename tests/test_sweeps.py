"""Arms along an axis: what is counted from settings, shares of a gain, sizes by themselves."""

import math
from dataclasses import replace

import frames
import numpy as np
import pandas as pd
import pytest
from test_claims import SETTINGS

from marlhf import claims, stats, sweeps
from marlhf.config import load_config
from marlhf.experiment import Experiment

MAIN = "mean RM score over training"


def config(*overrides):
    return load_config("tldr-tiny", *overrides)


@pytest.mark.parametrize("termination, n", [("token", 1), ("fixed", 7), ("whole", math.inf)])
def test_the_length_of_a_macro_action(termination, n):
    found = config(f"ppo.macro.termination={termination}", "ppo.macro.n=7")
    assert sweeps.macro_length(found) == n


def test_a_length_that_varies_is_refused():
    with pytest.raises(ValueError, match=r"termination=random.*token, fixed, whole"):
        sweeps.macro_length(config("ppo.macro.termination=random"))


def test_horizons_by_hand():
    assert sweeps.horizon(1, math.exp(-0.1)) == pytest.approx(10)
    assert sweeps.horizon(5, math.exp(-0.1)) == pytest.approx(50)
    assert sweeps.horizon(5, 1.0) == math.inf
    assert sweeps.horizon(math.inf, 0.95) == math.inf
    assert sweeps.matched_lambda(5, 0.95) == pytest.approx(0.9898, abs=5e-5)
    assert sweeps.matched_lambda(math.inf, 0.95) == 1
    same = sweeps.horizon(1, sweeps.matched_lambda(10, 0.9))
    assert same == pytest.approx(sweeps.horizon(10, 0.9))


def test_parameters_are_counted_from_the_settings():
    """600 d tied embeddings; a layer: 4 d² attention, 3 d ff, 2 d norms; d of a norm at the end."""
    axis = sweeps.axis(Experiment.load("fig09_scaling")).set_index("arm")
    for arm, d, ff in (("token_small", 32, 64), ("macro5", 64, 128), ("token_large", 128, 256)):
        layers = 2 * (4 * d * d + 3 * d * ff + 2 * d)
        assert axis.loc[arm, "parameters"] == 600 * d + layers + d
    assert axis.loc["token_small", "size"] == "39.8k parameters"
    assert axis.loc["macro5_large", "line"] == "MA-PPO, n = 5"
    assert axis.loc["macro5_large", "line_arm"] == "macro5"
    assert sweeps.size_name(2_506_172_416) == "2.51B parameters"


@pytest.fixture(scope="module")
def horizons():
    return sweeps.axis(Experiment.load("horizon"))


def test_the_axis_of_horizons(horizons):
    table = horizons.set_index("arm")
    assert table.loc["token", "horizon"] == pytest.approx(-1 / math.log(0.95))
    assert table.loc["macro5", "horizon"] == pytest.approx(5 * table.loc["token", "horizon"])
    assert math.isinf(table.loc["macro5_mc", "horizon"])
    assert set(table["line"]) == {"token PPO", "MA-PPO, n = 5"}


def test_pairs_of_nearly_the_same_horizon(horizons):
    wanted = [("macro5_80", "token", "token_80"), ("macro5", "token_99", "token")]
    assert sweeps.same_horizon(horizons) == wanted
    assert sweeps.same_horizon(horizons, tolerance=0.1) == wanted[1:]
    assert sweeps.same_horizon(horizons, tolerance=0.01) == []


def values(arms, endpoint=MAIN, unit="score"):
    """Endpoint rows of {arm: numbers of its chains}."""
    return pd.DataFrame([
        {"arm": arm, "label": arm.upper(), "chain": chain, "endpoint": endpoint, "unit": unit,
         "value": float(x), "censored": False}
        for arm, numbers in arms.items() for chain, x in enumerate(numbers)
    ])  # fmt: skip


def test_along_orders_by_x_and_names_who_is_missing(horizons):
    table = values({"token_mc": [1], "macro5_80": [2], "token_80": [3]})
    placed = sweeps.along(table, horizons, "horizon")
    assert list(placed["arm"]) == ["token_80", "macro5_80", "token_mc"]
    assert placed["x"].tolist() == pytest.approx([-1 / math.log(0.8), -5 / math.log(0.8), math.inf])
    with pytest.raises(ValueError, match="not on the axis: stranger"):
        sweeps.along(values({"stranger": [1]}), horizons, "horizon")


def test_the_last_evaluation_as_an_endpoint():
    evals = frames.evals(chains=2)
    found = sweeps.ends(evals, "kl", "final KL", "nats")
    assert list(found.columns) == list(claims.endpoints(evals, SETTINGS).columns)
    last = evals[(evals["arm"] == "whole") & (evals["chain"] == 1)].iloc[-1]
    one = found[(found["arm"] == "whole") & (found["chain"] == 1)]
    assert one["value"].item() == last["kl"]


def test_titles_are_those_of_what_is_there():
    settings = {**SETTINGS, "thresholds": [1.0, 1.5, 2.0]}
    evals = frames.evals(chains=1)
    found = sweeps.titles(settings, claims.endpoints(evals, settings))
    assert found == [MAIN, "updates to RM score 1.5", "final RM score", "final true score"]
    real = claims.endpoints(evals.assign(true_score=math.nan), settings)
    assert sweeps.titles(settings, real) == found[:3]


def test_gains_are_better_when_sooner():
    table = values({"a": [10, 30], "b": [15, 31]}, "updates to RM score 1.0", "updates")
    assert sweeps.gains(table, "updates to RM score 1.0", "a", "b").tolist() == [5, 1]
    assert sweeps.gains(values({"a": [2], "b": [3]}), MAIN, "a", "b").tolist() == [-1]


def test_a_share_of_a_known_whole_is_a_t_interval():
    part = [4.0, 5.0, 9.0]
    found, plain = sweeps.share(part, [10.0, 10.0, 10.0]), stats.mean_interval(part)
    assert (found.mean, found.low, found.high) == pytest.approx(
        (plain.mean / 10, plain.low / 10, plain.high / 10)
    )


def test_the_ends_of_a_share_are_where_a_t_test_stops_to_tell():
    part, whole = np.array([0.8, 1.1, 1.2, 0.9]), np.array([1.0, 1.3, 1.9, 1.4])
    found = sweeps.share(part, whole)
    assert found.low < found.mean < found.high
    low = stats.mean_interval(part - found.low * whole)
    high = stats.mean_interval(part - found.high * whole)
    assert low.low == pytest.approx(0, abs=1e-9)
    assert high.high == pytest.approx(0, abs=1e-9)
    assert sweeps.share(whole / 2, whole).high == pytest.approx(0.5)


def test_a_share_of_nothing_clear_is_unbounded():
    assert math.isinf(sweeps.share([1, 1, 1], [-1, 0, 2]).high)
    assert math.isinf(sweeps.share([1], [2]).low)
    with pytest.raises(ValueError, match="paired"):
        sweeps.share([1, 2], [1])


def test_shares_by_hand(horizons):
    table = values({
        "token_80": [1, 2, 3], "macro5_80": [1, 2, 3], "token": [0, 0, 0],
        "macro5": [2, 2.2, 1.8], "token_99": [1, 1.1, 0.9],
    })  # fmt: skip
    found = sweeps.shares(table, horizons, [MAIN]).set_index("arm")
    assert found.loc["macro5", ["token", "base"]].tolist() == ["token_99", "token"]
    assert found.loc["macro5", ["gain", "token_gain", "share"]].tolist() == [2, 1, 0.5]
    assert math.isinf(found.loc["macro5_80", "high"])  # gains nothing: there is no share
    assert "part of the gain" in sweeps.share_sentence(found.loc["macro5"])
    assert "first difference is not clear" in sweeps.share_sentence(found.loc["macro5_80"])


@pytest.mark.parametrize(
    "low, high, words",
    [
        (-0.5, 1.5, "cannot tell whether the horizon makes none of the gain or all of it"),
        (-0.5, 0.5, "from none, and it is not all"),
        (0.5, 1.5, "some of the gain, and cannot be told from all of it"),
        (0.2, 0.8, "the horizon makes part of the gain"),
        (1.2, 1.8, "the horizon makes more than the gain"),
        (-0.8, -0.2, "opposite of what macro actions do"),
    ],
)
def test_the_interval_of_a_share_gives_the_words(low, high, words):
    row = {
        "endpoint": MAIN, "label": "A", "token_label": "B", "base_label": "C", "horizon": 97.0,
        "token_horizon": 99.0, "gain": 0.2, "token_gain": 0.1, "share": (low + high) / 2,
        "low": low, "high": high, "chains": 3,
    }  # fmt: skip
    text = sweeps.share_sentence(row)
    assert words in text
    assert "3 chains" in text and "97 tokens" in text
    assert "no interval" in sweeps.share_sentence({**row, "chains": 1})
    lost = sweeps.share_sentence({**row, "gain": -0.2, "token_gain": -0.1})
    assert "loses 0.2 and B (99 tokens) loses 0.1" in lost


def sizes():
    """Frames of two sizes that share seeds, as an experiment's `frames()` has them."""
    made = frames.frames(chains=2, every=22, prompts=16)
    small = {"token": "token_small", "macro5": "macro5_small"}
    found = {}
    for key in ("evals", "metrics", "samples"):
        table = made[key][made[key]["arm"].isin(small)]
        found[key] = pd.concat([table, table.replace({"arm": small})], ignore_index=True)
    runs = []
    for size, accuracy in (("", 0.90), ("_small", 0.70)):
        stages = frames.manifests(2, (accuracy, accuracy))
        for _, row in stages.iterrows():
            name = f"{row['stage']}{size}{row['seed']}"
            above = f"sft{size}{row['seed']}" if row["stage"] == "rm" else ""
            runs.append({"arm": "", "hash": name, "parents": above, **row})
        for seed in (0, 1):
            up = f"sft{size}{seed} rm{size}{seed}"
            head = {"seed": seed, "minutes": 1.0, "revision": "0" * 40, "device": "a processor"}
            for arm in (f"token{size}", f"macro5{size}"):
                runs.append({**head, "arm": arm, "stage": "ppo", "hash": arm + str(seed),
                             "parents": up})  # fmt: skip
            runs.append({**head, "arm": "sft", "stage": "eval", "hash": f"eval{size}{seed}",
                         "parents": f"sft{size}{seed} {up}"})  # fmt: skip
    return found | {"runs": pd.DataFrame(runs)}


def test_runs_of_a_size_are_its_own():
    runs = sizes()["runs"]
    own = sweeps.own_runs(runs, ["token_small", "macro5_small"])
    assert set(own["hash"]) == {h for h in runs["hash"] if "_small" in h}
    assert len(own) == 2 * 5


def test_every_size_has_its_own_gates_and_quality():
    groups = {"40k": ["token_small", "macro5_small"], "121k": ["token", "macro5"]}
    pairs = [("macro5_small", "token_small"), ("macro5", "token")]
    made = sweeps.tables_by_group(sizes(), SETTINGS, pairs, groups)
    gate = made["gates"][made["gates"]["gate"] == "RM pair accuracy, held out"].set_index("group")
    assert gate["mean"].tolist() == pytest.approx([0.70, 0.90])
    assert gate["passes"].tolist() == [False, True]
    assert len(made["runs"]) == 2 * 10
    main = made["comparisons"][made["comparisons"]["endpoint"] == MAIN]
    assert list(zip(main["arm"], main["reference"], strict=True)) == pairs
    table = sweeps.parents_table(made["runs"]).set_index(["endpoint", "arm"])
    assert table.loc[("RM pair accuracy, held out", "40k"), "mean"] == pytest.approx(0.70)
    assert "SFT loss, held out" not in table.index.get_level_values(0)  # not in these manifests


def test_one_name_for_a_line_at_every_size():
    axis = sweeps.axis(Experiment.load("fig09_scaling"))
    lines = sweeps.as_lines(values({"token_small": [1], "macro5_large": [2]}), axis)
    assert lines["arm"].tolist() == ["token", "macro5"]
    assert lines["label"].tolist() == ["token PPO", "MA-PPO, n = 5"]
    assert lines["size"].tolist() == ["39.8k parameters", "405k parameters"]


def test_an_experiment_of_mixed_lengths_has_no_axis():
    experiment = Experiment.load("fig05_termination")
    with pytest.raises(ValueError, match="ppo.macro.termination="):
        sweeps.axis(replace(experiment, seeds=experiment.seeds[:1]))
