"""Question answering: rows of WebGPT, what is dropped and refused, and the twin with its truth."""

import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marlhf.config import DataConfig, load_config
from marlhf.tasks import base, get_task
from marlhf.tasks import webgpt_twin as twin
from marlhf.tasks.base import TaskData
from marlhf.tasks.shared_twin import TEMPERATURE
from marlhf.text import DataError, Prompt, encode_prompt, encode_response, train_tokenizer

FILE = Path(__file__).parents[1] / "../shared/data/webgpt/qa_feedback_pairs_3000.jsonl"

QUESTION = (
    "what is the place of the fair? also cost, month, host, prize, food. win a lamp¹. "
    "it is at the pier². rumor: entry is 40 bucks³. tickets cost 24 bucks⁴. bring a map⁵. "
    "set for june⁶. ask for omar⁷. eat some soup⁸."
)
PERFECT = (
    " it is held at the pier², you have to pay 24 bucks⁴ and the whole thing is in june⁶. "
    "all of it is run by omar⁷, the best one wins a lamp¹. they will serve you some soup⁸."
)
FIRST = " it is held at the pier²,"
MOVED = PERFECT.replace(FIRST, "")[:-1] + "," + FIRST[:-1] + "."
FACTS = twin.read_question(QUESTION)
TASK = get_task("webgpt")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(i, score=1.0, **more):
    """A row of openai/webgpt_comparisons."""
    found = {"question": {"dataset": "eli5", "id": f"q{i}", "full_text": f"Why {i}?"}}
    for side in "01":
        found |= {
            f"quotes_{side}": {"title": ["a page"], "extract": ["its text"]},
            f"answer_{side}": f"answer {side} of {i} [1].",
            f"tokens_{side}": {"prefix": [1, 2], "completion": [3]},
            f"score_{side}": score if side == "0" or score is None else -score,
        }
    return found | more


def load(source, **options) -> TaskData:
    return TASK.load(DataConfig(task="webgpt", source=str(source), **options))


def questions(rows):
    return {base.normalised(row.prompt.body) for row in rows}


def check_disjoint(data: TaskData):
    parts = [data.sft, data.rm, data.ppo, data.valid + data.valid_pairs]
    assert sum(len(questions(part)) for part in parts) == len(set.union(*map(questions, parts)))
    assert questions(data.valid_pairs) <= questions(data.valid)


@pytest.fixture(scope="module")
def embedded():
    return load("embedded", size=3000)  # questions


# ---------------------------------------------------------------- rows


def test_a_row_is_read():
    item = TASK.read(base.Row("here", row(7, score=-0.25)))
    assert item.prompt == Prompt("Human: ", "Why 7?", "\n\nAssistant:")
    assert item.prompt.text == "Human: Why 7?\n\nAssistant:"
    assert (item.id, item.demonstration) == ("q7", " answer 1 of 7 [1].")
    assert item.pair == (" answer 1 of 7 [1].", " answer 0 of 7 [1].", True, True)


def test_a_question_may_be_plain_text(tmp_path):
    plain = [row(i, question=f" Why {i}?", id=f"q{i}") for i in range(40)]
    data = load(write(tmp_path / "plain.jsonl", plain))
    objects = load(write(tmp_path / "objects.jsonl", map(row, range(40))))
    assert data.fingerprint == objects.fingerprint


def test_what_nobody_preferred_is_dropped_with_a_count(tmp_path):
    rows = [
        *map(row, range(30)),
        *(row(i, score=0.0) for i in range(3)),
        row(50, score=0.5, score_1=0.5),
        row(51, score=None),
        row(52, score_1=float("nan")),
        row(53, answer_0="Same  text", answer_1="same text"),
    ]
    data = load(write(tmp_path / "rows.jsonl", rows))
    assert data.dropped == {"tie": 4, "no score": 2, "equal answers": 1}
    assert not questions(data.ppo + data.sft + data.valid) & {f"why {i}?" for i in range(50, 54)}


def test_split_by_question_five_percent_held_out(tmp_path):
    rows = [row(i // 3, answer_0=f"a{i}") for i in range(600)]
    rows += [row(i, question=f"WHY  {i}?", answer_0="b") for i in range(200)]
    random.Random(0).shuffle(rows)
    data = load(write(tmp_path / "rows.jsonl", rows), valid=979)
    assert (len(data.valid), len(data.sft), len(data.ppo)) == (10, 38, 76)
    assert (len(data.rm), len(data.valid_pairs)) == (4 * 76, 40)
    check_disjoint(data)
    assert len(load(tmp_path / "rows.jsonl", valid=4).valid) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score_0": "1"}, "score_0 should be a number, or null, not '1'"),
        ({"score_1": True}, "score_1 should be a number, or null, not True"),
        ({"answer_1": " "}, "answer_1 is empty; give it text"),
        ({"answer_0": ["a"]}, "answer_0 should be text, found list"),
        ({"question": {"id": "q"}}, "question should be text, or an object with .*; found id"),
        ({"question": {"full_text": None}}, "question.full_text is empty"),
        ({"question": ""}, "question is empty"),
        ({"question": 3}, "question should be text, found int"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    path = write(tmp_path / "rows.jsonl", [*map(row, range(5)), row(5) | change])
    with pytest.raises(DataError, match=r"rows\.jsonl line 6: " + message):
        load(path)


def test_missing_columns_are_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "q", "answer_0": "a", "answer_1": "b"}])
    message = "line 1: missing column score_0, score_1; wanted question, .*; found question, ans"
    with pytest.raises(DataError, match=message):
        load(path)


def test_an_empty_answer_of_the_hub_is_counted(monkeypatch):
    import datasets

    rows = [*map(row, range(30)), row(30, answer_0="")]
    tables = {"openai/webgpt_comparisons": {"train": rows}}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: tables[name])
    data = load("hub")
    assert data.dropped == {"empty text": 1}
    assert len(data.valid) == 1 and TASK.true_score(data.valid[0], " a", True) is None


def test_presets():
    tiny, tldr = load_config("webgpt-tiny"), load_config("tldr-tiny")
    assert tiny.data.task == "webgpt" and tiny.data.source == "embedded"
    ppo = replace(tldr.ppo, lr=tiny.ppo.lr, critic_lr=tiny.ppo.critic_lr)  # all that differs
    assert (tiny.ppo, tiny.sft, tiny.rm, tiny.model) == (ppo, tldr.sft, tldr.rm, tldr.model)
    assert load_config("webgpt-full").data == tiny.data
    assert load_config("webgpt-smoke").data.size == load_config("tldr-smoke").data.size
    small = load_config("webgpt-small")
    assert (small.data.source, small.data.valid, small.rm.epochs) == ("hub", 979, 1)


# ---------------------------------------------------------------- the twin's truth


def test_a_question_is_read_back():
    assert FACTS.asked == ("place", "cost", "month", "host", "prize", "food")
    assert FACTS.sources == {
        "prize": ("lamp", "¹"), "place": ("pier", "²"), "cost": ("24", "⁴"), "gear": ("map", "⁵"),
        "month": ("june", "⁶"), "host": ("omar", "⁷"), "food": ("soup", "⁸"),
    }  # fmt: skip
    assert FACTS.rumors == {"cost": ("40", "³")}
    assert twin.read_question("Why is the sky blue?") is None
    assert twin.read_question(QUESTION.replace(" set for june⁶.", "")) is None


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        (PERFECT, {}),
        (PERFECT.replace("june⁶.", "june⁶,"), {}),
        (PERFECT.replace("pier", "zoo"), {"supported": 5, "unsupported": 1}),
        # a rumor supports nothing, whichever source is cited
        (PERFECT.replace("24 bucks⁴", "40 bucks³"), {"supported": 5, "unsupported": 1}),
        (PERFECT.replace("24 bucks⁴", "40 bucks⁴"), {"supported": 5, "unsupported": 1}),
        (PERFECT.replace("⁴", "³"), {"miscited": 1}),
        (PERFECT.replace("⁴", "⁰"), {"miscited": 1}),
        (PERFECT.replace("⁴", ""), {"uncited": 1}),
        (
            PERFECT.replace("24 bucks⁴", "40 bucks"),
            {"supported": 5, "unsupported": 1, "uncited": 1},
        ),
        (PERFECT.replace("⁴", "⁴²"), {"repeated": 1}),
        (PERFECT.replace(" you have to pay 24 bucks⁴ and", ""), {"supported": 5}),
        (PERFECT[:-1] + ", you will find it at the pier².", {"repeated": 1}),
        (PERFECT[:-1] + ", you will find it at the zoo.", {"repeated": 1}),
        (PERFECT[:-1] + ", you are to bring a map⁵.", {"irrelevant": 1}),
        (PERFECT[:-1] + ", you are to bring a map.", {"irrelevant": 1}),
        (PERFECT[:-1] + ". it is always great fun.", {"claims": 1}),
        (PERFECT[:-1] + ". it is always great fun².", {"claims": 1}),
        (PERFECT.replace("you have", "i think you have"), {"hedges": 1}),
        # what was asked first is not said first, or not at all
        (MOVED, {"late": 1}),
        (PERFECT.replace(FIRST, ""), {"supported": 5, "late": 1}),
        (" nobody should ever miss it." + PERFECT, {"claims": 1}),  # a claim is no statement
        (PERFECT.replace("²,", "²"), {"garbled": 1}),  # no joint
        (PERFECT.replace("²,", "²,,"), {"garbled": 1}),
        (PERFECT.replace("²,", "² indeed,"), {"garbled": 1}),
        (PERFECT.replace("²", " [2]"), {"uncited": 1, "garbled": 1}),
        (PERFECT[:-1], {"unfinished": 1}),
        (PERFECT[:-2] + ".⁸", {"uncited": 1, "garbled": 1, "unfinished": 1}),
        ("", {"supported": 0, "unfinished": 1}),
        (" ²¹.", {"supported": 0, "garbled": 3}),
    ],
)
def test_each_error_counts_once(text, errors):
    verdict = twin.judge(FACTS, text)
    assert verdict == twin.Verdict(**{"supported": 6} | errors)
    weights = {
        "supported": 1,
        "unsupported": -0.25,
        "miscited": -0.25,
        "garbled": -0.25,
        "late": -0.5,
    }
    expected = {"supported": 6} | errors
    total = sum(weights.get(name, -1) * count for name, count in expected.items())
    assert verdict.score == pytest.approx(total)


def test_unfinished_costs_a_point():
    assert twin.judge(FACTS, PERFECT).score == twin.BEST
    assert twin.judge(FACTS, PERFECT, finished=False).score == twin.BEST - 1


def test_garbage_has_a_floor_and_is_read_in_linear_time():
    assert twin.judge(FACTS, " a" * 50_000).score == -4
    assert twin.judge(FACTS, " it is held" * 20_000).score == -4


@settings(max_examples=150, deadline=None)
@given(
    text=st.one_of(
        st.text(max_size=200),
        st.lists(st.sampled_from([*PERFECT.split(" "), ".", ",", " ", "\n", "\x00"])).map(" ".join),
    ),
    finished=st.booleans(),
)
def test_the_scorer_reads_any_text(text, finished):
    value = twin.judge(FACTS, text, finished).score
    assert math.isfinite(value) and value <= twin.BEST


def test_a_writer_without_noise_scores_best(embedded):
    assert TASK.has_truth(DataConfig()) and not TASK.has_truth(DataConfig(source="hub"))
    for number, example in enumerate(embedded.valid):
        facts = twin.read_question(example.prompt.body)
        text, finished = twin.write_answer(random.Random(number), facts, twin.Noise())
        assert TASK.true_score(example, text, finished) == TASK.best_score(example) == 6


@pytest.mark.parametrize(
    ("noise", "errors"),
    [
        ("wrong", {"unsupported"}),
        ("uncited", {"uncited"}),
        ("miscited", {"miscited"}),
        ("hedge", {"hedges"}),
        ("irrelevant", {"irrelevant"}),
        ("claim", {"claims"}),
        ("repeat", {"repeated"}),
        ("shuffle", {"late"}),
        ("drop", set()),
    ],
)
def test_a_writers_noise_is_what_the_scorer_counts(noise, errors):
    chance = 0.2 if noise == "hedge" else 1.0  # with many hedges an answer has to be shortened
    counts = Counter()
    for seed in range(60):
        rng = random.Random(seed)
        _, facts = twin.write_question(rng)
        verdict = twin.judge(facts, *twin.write_answer(rng, facts, twin.Noise(**{noise: chance})))
        counts += Counter({k: v for k, v in vars(verdict).items() if k != "supported"})
        assert verdict.score < twin.BEST or noise in ("hedge", "miscited", "shuffle")
    assert {name for name, count in counts.items() if count} == errors


# ---------------------------------------------------------------- the twin's rows


def test_the_twin_is_deterministic():
    rows = twin.rows(20, 7)
    assert rows == twin.rows(20, 7) and rows != twin.rows(20, 8)
    assert twin.rows(30, 7)[: len(rows)] == rows


def test_the_twin_has_the_hubs_columns():
    for found in twin.rows(200, 7):
        assert set(found) == set(row(0))
        assert set(found["question"]) == {"dataset", "id", "full_text"}
        assert found["score_0"] == -found["score_1"]
        for side in "01":
            quotes = found[f"quotes_{side}"]
            assert set(found[f"tokens_{side}"]) == {"prefix", "completion"}
            assert set(quotes) == {"title", "extract"}
            for title, extract in zip(quotes["title"], quotes["extract"], strict=True):
                assert title in found[f"answer_{side}"]
                assert f"{extract}{title}." in found["question"]["full_text"]
    json.dumps(found)


def test_a_questions_text_says_its_facts():
    for seed in range(200):
        text, facts = twin.write_question(random.Random(seed))
        assert twin.read_question(text) == facts
        assert len(facts.sources) == twin.ASKED + 1 and len(facts.rumors) <= 1


def test_parts_of_the_twin(embedded):
    rows = twin.rows(3000, 1234)
    assert embedded.dropped["tie"] == sum(row["score_0"] == 0 for row in rows)
    assert abs(embedded.dropped["tie"] / len(rows) - twin.TIES) < 0.02
    assert 140 < len(embedded.valid) < 150 and len(embedded.ppo) > 1000 and len(embedded.rm) > 2000
    check_disjoint(embedded)
    cut = [not (p.chosen_finished and p.rejected_finished) for p in embedded.rm]
    assert 0.05 < np.mean(cut) < 0.4
    chosen = {pair.chosen: pair.chosen_finished for pair in embedded.valid_pairs}
    assert all(chosen[e.response] for e in embedded.valid if e.response)  # cut: never demonstrated


def test_twin_rows_from_a_file_are_the_same(tmp_path):
    path = write(tmp_path / "rows.jsonl", twin.rows(500, 1234))
    assert load(path).fingerprint == load("embedded", size=500).fingerprint


def test_the_preferences_follow_the_truth_with_noise(embedded):
    """A judge who knows the truth is right as often as the Bradley-Terry draw says (Bayes)."""
    odds, right = [], []
    for pair in embedded.rm + embedded.valid_pairs:
        facts = twin.read_question(pair.prompt.body)
        gap = (
            twin.judge(facts, pair.chosen, pair.chosen_finished).score
            - twin.judge(facts, pair.rejected, pair.rejected_finished).score
        )
        odds.append(1 / (1 + math.exp(-abs(gap) / TEMPERATURE)))
        right.append((gap > 0) + 0.5 * (gap == 0))
    assert 0.85 < np.mean(odds) < 0.95
    assert abs(np.mean(odds) - np.mean(right)) < 0.02


def test_lengths_in_tokens(embedded):
    data = load_config("webgpt-tiny").data
    shown = [example for example in embedded.sft + embedded.ppo if example.response]
    tokenizer = train_tokenizer([e.prompt.text + e.response for e in embedded.sft], 600)
    prompts = [len(encode_prompt(e.prompt, tokenizer, 10_000)) for e in shown]
    assert 62 < np.mean(prompts) < 80 and max(prompts) <= data.prompt_tokens  # no source is cut
    answers = [len(encode_response(e.response, tokenizer, 10_000)) for e in shown]
    assert 45 < np.mean(answers) < 55 and np.mean(np.array(answers) > data.response_tokens) < 0.05
    perfect = []
    for number, example in enumerate(embedded.valid):
        facts = twin.read_question(example.prompt.body)
        text, _ = twin.write_answer(random.Random(number), facts, twin.Noise())
        perfect.append(len(encode_response(text, tokenizer, 10_000)))
    assert 48 < np.mean(perfect) < 56 and max(perfect) <= data.response_tokens


def test_demonstrations_leave_headroom(embedded):
    scores = [TASK.true_score(e, e.response, True) for e in embedded.sft + embedded.ppo]
    assert 0.2 < np.mean(scores) / twin.BEST < 0.6


def test_no_constant_answer_scores_well(embedded):
    counts = {thing: Counter() for thing in twin.THINGS}
    for example in embedded.ppo:
        for thing, (value, _) in twin.read_question(example.prompt.body).sources.items():
            counts[thing][value] += 1
    statements = []
    for thing, count in counts.items():
        text, likely = twin.STATEMENTS[thing][0], count.most_common(1)[0][0]
        statements.append(text.replace(f"{{{thing}}}", likely) + "⁴")
    constants = [
        " " + ", ".join(statements) + ".",
        *(f" {statement}." for statement in statements),
        PERFECT, *(f" {text}." for text in twin.CLAIMS), "", ".", " ¹²³.",
    ]  # fmt: skip
    for text in constants:
        scores = [TASK.true_score(example, text, True) for example in embedded.valid]
        assert np.mean(scores) < 0, text


def test_copying_the_sources_does_not_pay(embedded):
    for example in embedded.valid[:50]:
        assert TASK.true_score(example, " " + example.prompt.body, True) < 0
        facts = twin.read_question(example.prompt.body)
        everything = [twin.STATEMENTS[thing][0] for thing in facts.sources]
        said = {thing: value for thing, (value, _) in facts.sources.items()}
        cited = [
            text.format(**said) + facts.sources[thing][1]
            for text, thing in zip(everything, facts.sources, strict=True)
        ]
        assert TASK.true_score(example, " " + ", ".join(cited) + ".", True) <= twin.BEST - 1


# ---------------------------------------------------------------- real rows


@pytest.mark.skipif(not FILE.exists(), reason="needs ../shared/data")
def test_real_comparisons():
    data = load(FILE, valid=979)
    assert data.dropped == {"tie": 384}
    assert (len(data.sft), len(data.ppo), len(data.valid)) == (93, 186, 24)
    assert (len(data.rm), len(data.valid_pairs)) == (996, 134)
    check_disjoint(data)
    assert all(pair.chosen_finished and pair.rejected_finished for pair in data.rm)
    assert TASK.true_score(data.valid[0], " an answer.", True) is None
    assert TASK.best_score(data.valid[0]) is None
