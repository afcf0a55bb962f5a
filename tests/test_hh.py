"""Dialogue: rows of two schemas, prompts of several turns, and the twin with its hidden truth."""

import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marlhf.config import DataConfig, load_config
from marlhf.tasks import get_task
from marlhf.tasks import hh_twin as twin
from marlhf.tasks.base import Row, normalised
from marlhf.tasks.hh import split_dialogue
from marlhf.tasks.shared_twin import TEMPERATURE
from marlhf.text import (
    DataError,
    decode,
    encode_prompt,
    encode_response,
    train_tokenizer,
)

SHARED = Path(__file__).parents[1] / "../shared/data"
real = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
task = get_task("hh")

PROMPT = (
    "\n\nHuman: i am tired. please pack the lamp, call the nurse and pay 20 bucks."
    "\n\nAssistant: ok, i will pack the lamp with care. what else?"
    "\n\nHuman: no, pack the kite, not the lamp. also cook the rice and invite tom."
    "\n\nAssistant:"
)
PERFECT = (
    " sure, i did pack the kite in a box and i did pay 20 bucks by card, i did cook the rice as "
    "you like. i will invite tom in a note and i did call the nurse just now. glad to help."
)
FACTS = twin.read_dialogue(PROMPT)


def turns(i, more=""):
    return f"\n\nHuman: one {i}?\n\nAssistant: two.{more}\n\nHuman: three\n\nAssistant:"


def row(i, **more):
    return {"prompt": turns(i), "response": " yes", "chosen": " yes", "rejected": " no"} | more


def whole(i, **more):
    """A row of Anthropic/hh-rlhf."""
    return {"chosen": turns(i) + " yes", "rejected": turns(i) + " no"} | more


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(source, **options):
    return task.load(DataConfig(task="hh", source=str(source), **options))


def all_pairs(data):
    return data.rm + data.valid_pairs


@pytest.fixture(scope="module")
def embedded():
    return load("embedded", size=3000)


@pytest.fixture(scope="module")
def tokenizer(embedded):
    texts = (text for e in embedded.sft for text in (e.prompt.text, e.response))
    return train_tokenizer(texts, 600)


# ---------------------------------------------------------------- rows of two schemas


def test_the_two_schemas_say_the_same(tmp_path):
    one = load(write(tmp_path / "one.jsonl", [row(i) for i in range(40)]), valid=4)
    two = load(write(tmp_path / "two.jsonl", [whole(i) for i in range(40)]), valid=4)
    assert one.fingerprint == two.fingerprint
    mixed = [(row if i % 2 else whole)(i) for i in range(40)]
    assert load(write(tmp_path / "mixed.jsonl", mixed), valid=4).fingerprint == one.fingerprint
    pair = one.rm[0]
    assert (pair.chosen, pair.rejected) == (" yes", " no")
    assert pair.prompt.text.startswith("\n\nHuman: one")
    assert pair.prompt.suffix == "\n\nAssistant:" and pair.prompt.cut == "start"


def test_a_dialogue_is_split_at_the_last_turn_of_the_assistant():
    assert split_dialogue("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d\n\ne") == (
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
        " d\n\ne",
    )


def test_what_is_dropped_is_counted(tmp_path):
    rows = [
        whole(0, rejected=turns(99) + " no"),
        whole(1, rejected=turns(1) + " no\n\nHuman: go on\n\nAssistant: well"),  # another split
        whole(2, rejected=turns(2) + "  Yes \n"),
        row(3, rejected=" YES"),
        whole(4, chosen=turns(4)),
        row(5, rejected="  "),
        row(6, chosen=" yes\n\nHuman: and?"),
        whole(7, rejected=turns(7) + " no\n\nHuman: and?"),
    ]
    data = load(write(tmp_path / "rows.jsonl", [*rows, *map(row, range(8, 20))]), valid=1)
    assert data.dropped == {
        "chosen and rejected have different prompts": 2,
        "tie": 2,
        "empty reply": 2,
        "reply goes on with further turns": 2,
    }
    assert len(data.sft) + len(data.rm) + len(data.ppo) + len(data.valid) == 12


def test_demonstrations(tmp_path):
    rows = [
        row(0, response=" because"),
        {"prompt": turns(1), "response": " alone"},
        row(2, extra={"finished": [False, True]}),
        row(3, response=" because", extra={"finished": [False, True]}),
    ]
    items = [task.read(Row("row", data)) for data in rows]
    assert [item.demonstration for item in items] == [" because", " alone", "", " because"]
    assert [item.pair and item.pair[2:] for item in items] == [
        (),
        None,
        (False, True),
        (False, True),
    ]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"chosen": turns(0) + " a"}, "missing column rejected; wanted chosen, rejected; found"),
        ({"prompt": turns(0), "chosen": " a"}, "missing column rejected; wanted prompt, chosen"),
        ({"prompt": turns(0), "text": "a"}, "missing columns; wanted prompt, chosen, rejected"),
        ({"text": "a"}, "missing columns; wanted prompt, chosen, rejected"),
        (row(0, prompt=""), "prompt is empty"),
        (row(0, prompt=3), "prompt should be text, found int"),
        (row(0, rejected=None), "rejected is empty"),
        (row(0, prompt="Why?"), r"prompt should be turns '\\n\\nHuman:' .* found 'Why\?'; other"),
        (row(0, prompt="\n\nHuman: Why?"), "prompt should be turns .* and end with the latter"),
        (row(0, prompt=turns(0) + " well"), "prompt should be turns .* and end with the latter"),
        (whole(0, rejected="no"), "rejected should be turns .*found 'no'; .*data.task=pairs"),
        (whole(0, chosen="\n\nHuman: a"), "chosen should be turns"),
        (whole(0, chosen=None), "chosen is empty"),
        (row(0, extra={"finished": [True]}), "extra.finished should be two booleans"),
        (row(0, extra={"finished": "no"}), "extra.finished should be two booleans"),
    ],
)
def test_a_bad_row_is_named(tmp_path, bad, message):
    path = write(tmp_path / "rows.jsonl", [*map(row, range(1, 6)), bad])
    with pytest.raises(DataError, match=r"rows\.jsonl line 6: " + message):
        load(path)


def test_a_hub_row_that_is_no_dialogue_is_dropped():
    for bad in (row(0, prompt="Why?"), whole(0, chosen="yes")):
        assert task.read(Row("row", bad, strict=False)) == "not a dialogue"


def test_the_hubs_whole_dialogues(monkeypatch):
    """Anthropic/hh-rlhf: its own test split is held out, and no row of it is fatal."""
    import datasets

    bad = [whole(50, chosen="yes"), whole(51, chosen=""), whole(52, rejected=turns(9) + " no")]
    tables = {"train": [whole(i) for i in range(20)] + bad, "test": map(whole, range(20, 26))}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: tables)
    data = load("Anthropic/hh-rlhf", valid=4)
    assert len(data.rm) == 8 and len(data.valid_pairs) == 4
    assert all(int(e.prompt.text.split()[2].strip("?")) >= 20 for e in data.valid)
    assert data.dropped == {
        "not a dialogue": 1,
        "empty text": 1,
        "chosen and rejected have different prompts": 1,
    }


# ---------------------------------------------------------------- prompts of several turns


def test_a_prompt_is_cut_by_whole_turns(tokenizer):
    text = (
        "\n\nHuman: one two three.\n\nfour five\n\nAssistant: six.\n\n- seven\n\n- eight"
        "\n\nHuman: nine\n\nten\n\nAssistant:"
    )
    prompt = task.read(Row("row", row(0, prompt=text))).prompt
    starts = set()
    for budget in range(12, len(tokenizer(text).input_ids) + 1):
        shown = decode(encode_prompt(prompt, tokenizer, budget), tokenizer)
        assert text.endswith(shown)
        if len(shown) >= len("\n\nHuman: nine\n\nten\n\nAssistant:"):
            starts.add(shown[:9])
    assert starts == {"\n\nHuman: ", "\n\nAssista"}  # never at the paragraphs within a turn


# ---------------------------------------------------------------- the twin's truth


def score(text, finished=True, facts=FACTS):
    return twin.judge(facts, text, finished).score


def test_a_dialogue_is_read_back():
    assert FACTS.asked == {
        "pack": "kite", "pay": "20", "cook": "rice", "invite": "tom", "call": "nurse",
    }  # fmt: skip
    assert FACTS.stale == {"pack": "lamp"}
    assert twin.read_dialogue(turns(0)) is None
    assert twin.read_dialogue(PROMPT.removesuffix("\n\nAssistant:")) is None


CLOSE = " glad to help."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PERFECT, 7),
        (PERFECT.replace("like. i", "like, i"), 7),
        (PERFECT.replace("kite", "lamp"), 6),  # the correction was not heeded
        (PERFECT.replace("kite", "sofa"), 6),
        (PERFECT.replace(" i did cook the rice as you like.", ""), 6),  # one errand less
        (PERFECT.replace(" sure,", ""), 6),  # no opening
        (PERFECT.replace(CLOSE, ""), 6),  # no close
        (PERFECT.replace(" sure,", " sure, gladly,"), 6),  # one opening is enough
        (PERFECT.replace(CLOSE, CLOSE + CLOSE), 6),  # and one close
        (PERFECT.replace(" sure,", " glad to help, sure,"), 4),  # both out of place
        (PERFECT.replace(CLOSE, " i will pack the kite with care." + CLOSE), 6),  # said twice
        (PERFECT.replace(CLOSE, " i did pack the lamp in a box." + CLOSE), 6),  # hedged
        (PERFECT.replace(CLOSE, " i did feed the cat this week." + CLOSE), 6),  # nobody asked
        (PERFECT.replace(CLOSE, " i can sell you a car." + CLOSE), 6),  # an offer
        (PERFECT.replace(CLOSE, " it won a prize." + CLOSE), 6),  # invented
        (PERFECT.replace(CLOSE, " stop asking me." + CLOSE), 6),  # rude
        (PERFECT.replace("like. i", "like. you know i"), 6),  # a filler
        (PERFECT.replace("like. i", "like i"), 6.75),  # no joint
        (PERFECT.replace("like. i", "like.. i"), 6.75),
        (PERFECT.replace(" nurse", " nu rse"), 6 - 8 / 4),  # eight loose words
        (PERFECT[:-1], 6),  # no full stop
        (PERFECT + " ", 5.75),
        (PERFECT.upper(), -3),
        ("", -1),
        (".", -0.25),
        (" sure.", 1),
        (" glad to help.", 1),
        (" x" * 100, -4),
        (PERFECT + PERFECT, 0),  # five repeated, an opening and a close out of place
    ],
)
def test_true_score_of_a_reply(text, expected):
    assert score(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("sentence", "count"),
    [
        ("i will pack the kite with care", "repeated"),
        ("i did feed the cat this week", "extras"),
        ("i can sell you a car", "extras"),
        ("it won a prize", "invented"),
        ("stop asking me", "rude"),
        ("gladly", "fillers"),
        ("blah", "garbled"),
    ],
)
def test_each_error_is_counted_once(sentence, count):
    good = twin.judge(FACTS, PERFECT)
    assert good == twin.Verdict(right=5, polite=2)
    verdict = twin.judge(FACTS, PERFECT.replace(CLOSE, f" {sentence}.{CLOSE}"))
    assert verdict == twin.Verdict(right=5, polite=2, **{count: 1})


def test_unfinished_costs_a_point():
    assert score(PERFECT, finished=False) == 6


def test_each_errand_more_is_worth_one():
    reports = [twin.ERRANDS[k].reports[1].format(x=v) for k, v in FACTS.asked.items()]
    texts = [" " + ", ".join(reports[:n]) + "." for n in range(1, 6)]
    assert [score(text) for text in texts] == [1, 2, 3, 4, 5]
    assert score(" " + ", ".join(reports[::-1]) + ".") == 5


@settings(max_examples=150, deadline=None)
@given(
    text=st.one_of(
        st.text(max_size=200),
        st.lists(st.sampled_from([*PERFECT.split(" "), ".", ",", " ", "\n", "\x00"])).map(" ".join),
    ),
    finished=st.booleans(),
)
def test_the_scorer_reads_any_text(text, finished):
    value = score(text, finished)
    assert math.isfinite(value) and value <= twin.BEST


def test_garbage_is_read_in_linear_time():
    assert score(" a" * 50_000) == score(" i did pack" * 30_000) == -4


# ---------------------------------------------------------------- the twin's rows


def test_the_twin_is_deterministic():
    rows = twin.rows(20, 7)
    assert rows == twin.rows(20, 7) and rows != twin.rows(20, 8)
    assert twin.rows(30, 7)[: len(rows)] == rows


def test_the_twin_has_the_hubs_columns():
    rows = twin.rows(5, 7)
    assert len(rows) == 5 * twin.PAIRS_PER_PROMPT
    assert {tuple(row) for row in rows} == {("prompt", "response", "chosen", "rejected", "extra")}
    assert len({row["prompt"] for row in rows}) == 5
    json.dumps(rows)


def test_a_dialogues_text_says_its_facts():
    values = [value for errand in twin.ERRANDS.values() for value in errand.values]
    assert len(set(values)) == len(values)  # a value tells its kind
    turns, stale = [], []
    for seed in range(400):
        prompt, facts = twin.write_dialogue(random.Random(seed))
        assert twin.read_dialogue(prompt) == facts
        assert len(facts.asked) == twin.ASKED and prompt.endswith("\n\nAssistant:")
        assert all(facts.asked[kind] != old for kind, old in facts.stale.items())
        turns.append(prompt.count("\n\nHuman:"))
        stale.append(len(facts.stale))
    assert set(turns) == {1, 2} and 1.7 < np.mean(turns) < 1.8
    assert set(stale) == {0, 1} and 0.45 < np.mean(stale) < 0.55


def test_parts_of_the_twin(embedded):
    assert (len(embedded.sft), len(embedded.rm), len(embedded.ppo)) == (549, 2194, 1098)
    assert (len(embedded.valid), len(embedded.valid_pairs)) == (256, 512)
    assert embedded.dropped == {}
    keys = [
        {normalised(row.prompt.text) for row in part}
        for part in (embedded.sft, embedded.rm, embedded.ppo, embedded.valid)
    ]
    assert sum(map(len, keys)) == len(set.union(*keys)) == 3000
    unfinished = [not (p.chosen_finished and p.rejected_finished) for p in embedded.rm]
    assert 0.05 < np.mean(unfinished) < 0.4


def test_twin_rows_from_a_file_are_the_same(tmp_path):
    path = write(tmp_path / "rows.jsonl", twin.rows(300, 1234))
    assert load(path).fingerprint == load("embedded", size=300).fingerprint


def test_lengths_in_tokens(embedded, tokenizer):
    limits = load_config("hh-tiny").data
    examples = embedded.sft + embedded.ppo
    prompts = [len(encode_prompt(e.prompt, tokenizer, 10_000)) for e in examples]
    assert 70 < np.mean(prompts) < 80 and max(prompts) <= limits.prompt_tokens
    replies = [len(encode_response(e.response, tokenizer, 10_000)) for e in examples]
    assert 45 < np.mean(replies) < 55 and np.mean(np.array(replies) > limits.response_tokens) < 0.01
    perfect = []
    for number, example in enumerate(embedded.valid):
        facts = twin.read_dialogue(example.prompt.text)
        text, finished = twin.write_reply(random.Random(number), facts, twin.Noise())
        assert finished and twin.judge(facts, text).score == twin.BEST == task.best_score(example)
        perfect.append(len(encode_response(text, tokenizer, 10_000)))
    assert 52 < np.mean(perfect) < 58 and max(perfect) <= limits.response_tokens


def test_demonstrations_leave_headroom(embedded):
    scores = [task.true_score(e, e.response, True) for e in embedded.sft + embedded.ppo]
    assert 0.3 < np.mean(scores) / twin.BEST < 0.6


def test_the_noise_of_the_preferences(embedded):
    """Of a judge who knows the truth: what the Bradley-Terry draw leaves (Bayes)."""
    odds, right = [], []
    for pair in all_pairs(embedded):
        facts = twin.read_dialogue(pair.prompt.text)
        gap = score(pair.chosen, pair.chosen_finished, facts) - score(
            pair.rejected, pair.rejected_finished, facts
        )
        odds.append(1 / (1 + math.exp(-abs(gap) / TEMPERATURE)))
        right.append((gap > 0) + 0.5 * (gap == 0))
    assert 0.85 < np.mean(odds) < 0.94
    assert abs(np.mean(odds) - np.mean(right)) < 0.02


def test_nothing_constant_scores_well(embedded):
    counts = {kind: Counter() for kind in twin.KINDS}
    for example in embedded.ppo:
        for kind, value in twin.read_dialogue(example.prompt.text).asked.items():
            counts[kind][value] += 1
    reports = [
        twin.ERRANDS[kind].reports[0].format(x=count.most_common(1)[0][0])
        for kind, count in counts.items()
    ]
    constants = [
        " sure, " + ", ".join(reports) + ". glad to help.",
        " sure, " + ", ".join(reports[:5]) + ". glad to help.",
        embedded.sft[0].response,
        PERFECT,
        *(f" {text}." for text in (*reports, *twin.FILLERS, *twin.INVENTED, *twin.RUDE)),
        "",
        ".",
    ]
    for text in constants:
        scores = [task.true_score(example, text, True) for example in embedded.valid]
        assert np.mean(scores) < twin.BEST / 7, text
    polite = [task.true_score(e, " sure. glad to help.", True) for e in embedded.valid]
    assert np.mean(polite) == 2  # below what the demonstrations are worth


def test_copying_the_prompt_does_not_pay(embedded):
    for example in embedded.valid[:50]:
        assert task.true_score(example, " " + example.prompt.body, True) < 0


def test_truth_is_the_twins_alone(tmp_path):
    assert task.has_truth(DataConfig(task="hh"))
    assert not task.has_truth(DataConfig(task="hh", source="hub"))
    example = load(write(tmp_path / "rows.jsonl", [row(i) for i in range(12)])).valid[0]
    assert task.true_score(example, " x", True) is task.best_score(example) is None


# ---------------------------------------------------------------- real rows


@real
def test_real_dialogues(tmp_path):
    path = SHARED / "hh/helpful_base_2339.jsonl"
    data = load(path)
    assert (len(data.sft), len(data.rm), len(data.ppo)) == (421, 843, 842)
    assert len(data.valid) == len(data.valid_pairs) == 233 and data.dropped == {}
    assert all(row.prompt.suffix == "\n\nAssistant:" for row in data.sft + data.rm + data.ppo)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    dialogues = [{c: r["prompt"] + r[c] for c in ("chosen", "rejected")} for r in rows]
    again = load(write(tmp_path / "rows.jsonl", dialogues))
    assert again.fingerprint == data.fingerprint
    assert task.true_score(data.valid[0], " x", True) is None
