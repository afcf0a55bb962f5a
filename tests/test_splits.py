"""The same responses under every termination condition: their table and its pictures."""

import math

import pandas as pd
import pytest

from marlhf import report, splits
from marlhf.experiment import Experiment


def table(**arms):
    """{arm: responses}, a response as text in which bars end macro actions and / parts tokens."""
    rows = []
    for arm, responses in arms.items():
        for number, text in enumerate(responses):
            token = 0
            for segment, macro in enumerate(text.split("│")):
                for piece in macro.split("/"):
                    head = {"prompt_id": f"p{number}", "arm": arm, "label": arm.upper()}
                    piece = splits.quoted(piece)
                    rows.append({**head, "token": token, "piece": piece, "segment": segment})
                    token += 1
    return pd.DataFrame(rows)


TABLE = table(
    token=[" a│ b│ nan│.", " a│ b"],
    macro5=[" a/ b/ nan/.", " a/ b"],
    parsing=[" a/ b│ nan/.", " a│ b"],
)


def test_a_table_outlives_its_file(tmp_path):
    report.write_tables(tmp_path, {"splits": TABLE})
    again = report.read_tables(tmp_path)["splits"]
    pd.testing.assert_frame_equal(again, TABLE)
    assert splits.texts(again).alt == splits.texts(TABLE).alt


def test_the_picture_says_where_macro_actions_end():
    alt = splits.texts(splits.first(TABLE, 1)).alt
    assert "TOKEN: a│ b│ nan│.│. MACRO5: a b nan.│. PARSING: a b│ nan.│." in alt
    assert alt.count("PARSING") == 1 and splits.texts(TABLE).alt.count("PARSING") == 2


def test_a_long_response_is_set_in_lines():
    long = table(token=["│".join([" word"] * 40)])
    lines = splits._lines(long)
    assert [len(line) for line in lines] == [15, 15, 10]  # 78 characters of five to a token
    assert all(start + len(piece) <= splits.COLUMNS for line in lines for start, piece, *_ in line)
    assert all(ends for line in lines for *_, ends in line)


def test_lengths_of_macro_actions():
    found = splits.lengths(TABLE).set_index(["arm", "length"])
    assert found.loc[("token", 1), "share"] == 1
    assert found.loc[("macro5", 4), "share"] == found.loc[("macro5", 2), "share"] == 0.5
    assert found.loc[("parsing", 2), "share"] == found.loc[("parsing", 1), "share"] == 0.5
    assert found.loc[("parsing", 1), "mean"] == 1.5
    assert (found.groupby("arm")["share"].sum() == 1).all()
    alt = splits.length_bars(splits.lengths(TABLE)).alt
    assert "MACRO5: mean 3.0 tokens" in alt and "TOKEN" not in alt


def test_sentences_without_a_parse_are_told_with_what_parsing_costs():
    counts = pd.DataFrame({
        "arm": "parsing", "label": "parsing", "chain": [0, 0, 1, 1], "update": [1, 2, 1, 2],
        "sentences": [100, 100, 100, 100], "fallbacks": [3, 1, 0, 0],
    })  # fmt: skip
    counts["fallback_share"] = counts["fallbacks"] / counts["sentences"]
    seconds = {"sec_rollout": [8.0, 1.0], "sec_advantages": [2.0, 9.0]}
    metrics = pd.DataFrame({"arm": ["parsing", "token"], **seconds})
    said = splits.parser_sentence(counts, metrics)
    assert (
        "400 sentences in training, 4 without a parse: 1.00% (single chains 0.00 to 2.00%)" in said
    )
    assert "20.0% of an update's time" in said
    assert (
        "1.50% at the first, at most 1.50% (update 1), 0.50% at the last"
        in splits.fallbacks(counts).alt
    )


@pytest.mark.slow
def test_every_arm_splits_the_same_responses(monkeypatch, tmp_path):
    monkeypatch.setenv("MARLHF_RUNS", str(tmp_path))
    experiment = Experiment.load("fig05_termination", "smoke", seeds=[0])
    specs = [s for s in experiment.specs() if s.stage in ("sft", "rm")]
    from marlhf.experiment import execute

    execute(specs, workers=0, progress=False)
    found = splits.split_responses(experiment)
    assert list(dict.fromkeys(found["arm"])) == list(experiment.arms)
    texts = found.groupby("arm")["piece"].agg("".join)
    assert texts.nunique() == 1
    macros = found.groupby("arm").apply(
        lambda g: g.groupby("prompt_id")["segment"].max().add(1).sum()
    )
    tokens = len(found) // len(experiment.arms)
    assert macros["token"] == tokens
    by_five = found[found["arm"] == "macro5"].groupby("prompt_id").size()
    assert macros["macro5"] == sum(math.ceil(n / 5) for n in by_five)
    assert macros[["random", "perplexity", "parsing"]].max() < tokens + 1
