"""Tasks: rows of every schema, the split, what is refused, and the twin with its hidden truth."""

import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marlhf.config import DataConfig
from marlhf.tasks import base, get_task, task_names
from marlhf.tasks import tldr_twin as twin
from marlhf.tasks.base import TaskData
from marlhf.tasks.shared_twin import TEMPERATURE
from marlhf.text import DataError, Prompt, encode_prompt, encode_response, train_tokenizer

SHARED = Path(__file__).parents[1] / "../shared/data"
real = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")

POST = (
    "took my lamp. my boss mara rang. it rains. met at the pier. it was june. yuki got 38. "
    "paid 40. i will sue. i like tea."
)
PERFECT = (
    " this is all about the boss mara and they took the lamp that op had, all of this was at the "
    "pier and this was some time in june. op lost a sum of 40 bucks, in the end op might just sue."
)
FACTS = twin.read_post(POST)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def post_row(i, **more):
    row = {"id": f"p{i}", "subreddit": "home", "title": "t", "post": f"Post {i}"}
    return row | {"summary": f"s{i}"} | more


def comparison_row(i, choice=0, policies=("sup", "ppo"), **more):
    info = {"id": f"c{i}", "subreddit": "home", "title": "t", "post": f"post  {i}"}
    texts = (f"a{i}", f" b{i}")
    summaries = [{"text": t, "policy": p} for t, p in zip(texts, policies, strict=True)]
    return {"info": info, "summaries": summaries, "choice": choice} | more


def axis_row(i, policy="ref", **more):
    info = {"id": f"x{i}", "subreddit": "home", "title": "t", "post": f"post {i}"}
    return {
        "info": info,
        "summary": {"text": f"x{i}", "policy": policy, "axes": {"overall": 5}},
    } | more


def load(source, task="tldr", **settings) -> TaskData:
    return get_task(task).load(DataConfig(task=task, source=str(source), **settings))


def keys(rows):
    return {base.normalised(row.prompt.text) for row in rows}


def check_disjoint(data: TaskData):
    parts = [keys(data.sft), keys(data.rm), keys(data.ppo), keys(data.valid + data.valid_pairs)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert keys(data.valid_pairs) <= keys(data.valid)


@pytest.fixture(scope="module")
def embedded():
    return load("embedded", size=3000)  # posts


# ---------------------------------------------------------------- names


def test_tasks_by_name():
    assert {"tldr", "pairs"} <= set(task_names())
    assert not {"base", "tldr_twin"} & set(task_names())
    for name in task_names():
        assert get_task(name).name == name
    with pytest.raises(DataError, match="unknown task 'tlrd': did you mean 'tldr'"):
        get_task("tlrd")


# ---------------------------------------------------------------- rows of three schemas


def test_three_schemas_in_one_folder(tmp_path):
    write(tmp_path / "a.jsonl", [comparison_row(0), comparison_row(1, choice=1)])
    write(tmp_path / "b.jsonl", [post_row(0), axis_row(2), axis_row(3, policy="ppo")])
    data = load(tmp_path, valid=1, split=[0.0, 1.0, 0.0])
    rows = data.rm + data.valid_pairs
    assert {(pair.chosen, pair.rejected) for pair in rows} == {(" a0", " b0"), (" b1", " a1")}
    data = load(tmp_path, valid=1, split=[0.0, 0.0, 1.0])
    shown = {example.prompt.body.split()[-1]: example for example in data.ppo + data.valid}
    # the human summary before the chosen one, also where the comparison comes first
    assert [shown[i].response for i in "0123"] == [" s0", " b1", " x2", ""]
    assert shown["0"].prompt == Prompt("SUBREDDIT: r/home\nTITLE: t\nPOST: ", "post  0", "\nTL;DR:")
    assert shown["0"].prompt.text == "SUBREDDIT: r/home\nTITLE: t\nPOST: post  0\nTL;DR:"


def test_the_human_summary_of_a_comparison_is_the_demonstration(tmp_path):
    rows = [comparison_row(i, choice=0, policies=("sup", "ref")) for i in range(12)]
    data = load(write(tmp_path / "rows.jsonl", rows), valid=1, split=[1.0, 0.0, 0.0])
    assert all(example.response.startswith(" b") for example in data.sft)
    assert all(pair.chosen.startswith(" a") for pair in data.valid_pairs)


def test_an_unfinished_summary_is_marked_and_never_demonstrated(tmp_path):
    rows = [
        comparison_row(i, extra={"confidence": None, "finished": [False, True]}) for i in range(12)
    ]
    data = load(write(tmp_path / "rows.jsonl", rows), valid=1, split=[0.5, 0.5, 0.0])
    assert all(not p.chosen_finished and p.rejected_finished for p in data.rm + data.valid_pairs)
    assert data.sft == [] and data.dropped == {"no demonstration": 6}
    with pytest.raises(DataError, match="nothing for the part 'sft': it needs demonstrations"):
        data.require("sft")
    assert data.require("rm") == data.rm


def test_ties_and_news_are_dropped_with_a_count(tmp_path):
    news = comparison_row(1)
    news["info"] |= {"post": None, "article": "In the news"}
    rows = [comparison_row(0, choice=None), news, *map(post_row, range(2, 12))]
    data = load(write(tmp_path / "rows.jsonl", rows))
    assert data.dropped == {"tie": 1, "news article": 1}


def test_one_id_for_one_prompt(tmp_path):
    rows = [post_row(i, id="same") for i in range(30)]
    data = load(write(tmp_path / "rows.jsonl", rows))
    ids = [example.id for example in data.sft + data.ppo + data.valid]
    assert len(set(ids)) == len(ids)


# ---------------------------------------------------------------- the split


def test_split_by_post(tmp_path):
    rows = [*map(post_row, range(200)), *map(comparison_row, range(0, 200, 2))]
    data = load(write(tmp_path / "rows.jsonl", rows))
    assert (len(data.sft), len(data.ppo), len(data.valid)) == (36, 72, 20)  # a tenth held out
    check_disjoint(data)
    shuffled = random.Random(0).sample(rows, len(rows))
    again = load(write(tmp_path / "other.jsonl", shuffled))
    assert [e.prompt.body.lower().split() for e in again.ppo] == [
        e.prompt.body.lower().split() for e in data.ppo
    ]
    other = load(tmp_path / "rows.jsonl", seed=1)
    assert keys(other.sft) != keys(data.sft) and other.fingerprint != data.fingerprint
    assert load(tmp_path / "rows.jsonl").fingerprint == data.fingerprint
    assert load(tmp_path / "rows.jsonl", valid=5).valid == data.valid[:5]


def test_shares_need_not_use_everything(tmp_path):
    path = write(tmp_path / "rows.jsonl", map(post_row, range(110)))
    data = load(path, valid=10, split=[0.1, 0.2, 0.3])
    assert (len(data.sft), len(data.ppo)) == (10, 30)


def test_the_sources_own_held_out_rows(tmp_path):
    rows = [comparison_row(i, split="valid1" if i % 4 == 0 else "train") for i in range(80)]
    rows.append(comparison_row(0, split="train"))  # a held-out post's other rows are held out too
    data = load(write(tmp_path / "rows.jsonl", rows), valid=12)
    held = {base.normalised(f"post {i}") for i in range(0, 80, 4)}
    assert len(data.valid) == 12
    assert {base.normalised(e.prompt.body) for e in data.valid} <= held
    for row in data.sft + data.rm + data.ppo:
        assert base.normalised(row.prompt.body) not in held


def test_held_out_rows_alone_are_split_as_any_other(tmp_path):
    rows = [comparison_row(i, split="validation") for i in range(40)]
    data = load(write(tmp_path / "rows.jsonl", rows))
    assert (len(data.valid), len(data.rm)) == (4, 15)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"post": "p", "title": "t", "summary": "s"},
            "missing column subreddit; wanted subreddit, "
            "title, post, summary; found post, title, summary",
        ),
        (
            {"prompt": "p"},
            "missing columns; wanted info, summaries, choice; or info, summary; or subreddit, "
            "title, post, summary; found prompt. Rename the columns to those that the task tldr",
        ),
        ({"info": {}, "summaries": []}, "missing column choice; wanted info, summaries, choice"),
        (post_row(0, summary=" "), "summary is empty; give it text"),
        (post_row(0, post=None), "post is empty"),
        (post_row(0, post=3), "post should be text, found int"),
        (comparison_row(0, choice=2), "choice should be 0, 1, or null for a tie, not 2"),
        (comparison_row(0, choice="0"), "choice should be 0, 1, or null for a tie, not '0'"),
        (comparison_row(0, summaries=[{"text": "a"}]), "summaries should be a list of two objects"),
        (comparison_row(0, summaries=[{"text": "a"}, {}]), r"summaries\[1\].text is empty"),
        (comparison_row(0, info=[]), "info should be an object"),
        (comparison_row(0, info={"post": "p"}), "info: missing column subreddit, title; wanted"),
        (axis_row(0, summary="text"), "summary should be an object with text and axes"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", [*map(post_row, range(5)), row])
    with pytest.raises(DataError, match=r"rows\.jsonl line 6: " + message):
        load(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "c"}, "missing column rejected; wanted prompt, chosen, rej"),
        (
            {"prompt": "p", "text": "c"},
            "missing columns; wanted prompt, chosen, rejected; or prompt, response; found prompt, "
            "text. Rename the columns to those that the task pairs reads",
        ),
        ({"prompt": "", "response": "c"}, "prompt is empty"),
        ({"prompt": "p", "response": ""}, "response is empty"),
        ({"prompt": "p", "chosen": "c", "rejected": None}, "rejected is empty"),
    ],
)
def test_a_bad_row_of_pairs_is_named(tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p", "response": "r"}, row])
    with pytest.raises(DataError, match=r"rows\.jsonl line 2: " + message):
        load(path, task="pairs")


# A row of each kind, and the tasks that read it.
KINDS = {
    "posts": (post_row(0), ["tldr"]),
    "comparisons": (comparison_row(0), ["tldr"]),
    "axis": (axis_row(0), ["tldr"]),
    "full-hh": (dict.fromkeys(("prompt", "response", "chosen", "rejected"), "a"), ["hh", "pairs"]),
    "demonstrations": ({"prompt": "a", "response": "b"}, ["hh", "pairs"]),
    "dialogues": ({"chosen": "a", "rejected": "b"}, ["hh"]),
    "webgpt": (
        dict.fromkeys(("question", "answer_0", "score_0", "answer_1", "score_1"), "a"),
        ["webgpt"],
    ),
    "apps": (
        dict.fromkeys(("question", "solutions", "input_output", "difficulty", "starter_code"), "a"),
        ["apps"],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_tasks_columns_are_known(tmp_path, kind):
    row, readers = KINDS[kind]
    path = write(tmp_path / "rows.jsonl", [row])
    choices = " or ".join(f"data.task={name}" for name in readers)
    mend = f"These are the columns of {' and '.join(readers)}: set {choices}"
    for name in task_names():
        task = get_task(name)
        assert task.takes(row) == (name in readers)
        if name in readers:
            continue
        with pytest.raises(DataError) as error:
            load(path, task=name)
        text = str(error.value)
        assert text.startswith(f"{path} line 1: missing column")
        assert text.endswith(f"; found {', '.join(row)}. {mend}")
        assert any(", ".join(schema) in text for schema in task.schemas)


def test_a_row_short_of_a_column_is_not_called_another_tasks(tmp_path):
    """Of prompt, chosen, response hh and pairs both want rejected: neither is a way out."""
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p", "chosen": "c", "response": "r"}])
    for name in ("hh", "pairs", "webgpt"):
        with pytest.raises(DataError, match=f"Rename the columns .* the task {name} reads"):
            load(path, task=name)


def write_table(path, rows):
    frame = pd.DataFrame(rows)
    (frame.to_csv if path.suffix == ".csv" else frame.to_parquet)(path, index=False)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_table_is_refused_with_the_way_to_jsonl(tmp_path, suffix, folder):
    table = tmp_path / f"rows{suffix}"
    write_table(table, [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(20)])
    source = tmp_path if folder else table
    with pytest.raises(DataError) as error:
        load(source, task="pairs")
    found = re.fullmatch(
        rf'{table}: only .jsonl files are read, no {suffix}. Make one of it: python -c "(.*)".',
        str(error.value),
    )
    with pytest.raises(DataError) as error:
        load(source, task="tldr")
    assert "Its columns are not the task's either: missing columns; wanted info" in str(error.value)
    assert "; found prompt, response. These are the columns of hh and pairs" in str(error.value)
    exec(found[1], {})
    assert len(load(tmp_path, task="pairs").ppo) == 7


def test_a_broken_table_is_refused(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 \xff")
    with pytest.raises(DataError, match="rows.parquet: only .jsonl files are read, no .parquet"):
        load(tmp_path / "rows.parquet", task="pairs")


def test_bad_sources(tmp_path):
    with pytest.raises(DataError, match="unknown source 'embeded': did you mean 'embedded'"):
        load("embeded")
    with pytest.raises(DataError, match="unknown source 'rows.jsonl'.* path of a .jsonl file"):
        load("rows.jsonl")
    with pytest.raises(DataError, match="no .jsonl file in this folder"):
        load(tmp_path)
    with pytest.raises(DataError, match="empty.jsonl: no rows"):
        load(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(DataError, match="no rows to use; dropped: {'tie': 1}"):
        load(write(tmp_path / "ties.jsonl", [comparison_row(0, choice=None)]))
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(DataError, match="bad.jsonl line 2: malformed JSON"):
        load(tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match="'pairs' has no embedded twin: set data.source"):
        load("embedded", task="pairs")


# ---------------------------------------------------------------- the hub


def test_hub_rows_of_a_parquet_conversion(tmp_path):
    """A folder laid out as the hub's conversion of summarize_from_feedback."""
    import datasets

    for folder, split, rows in (
        ("comparisons", "train", [comparison_row(i, split="train") for i in range(20)]),
        ("comparisons", "validation", [comparison_row(i, split="valid1") for i in range(20, 26)]),
        ("axis", "test", [axis_row(i, split="test") for i in range(26, 30)]),
    ):
        file = tmp_path / folder / split / "0000.parquet"
        file.parent.mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(file)
    rows = base.hub_rows(str(tmp_path), folders=("comparisons", "axis"))
    assert len(rows) == 30 and rows[0].data["choice"] == 0
    assert Counter(row.split for row in rows) == {"train": 20, "valid1": 6, "test": 4}


@pytest.fixture
def hub(monkeypatch):
    """datasets.load_dataset with stored tables in the place of the hub."""
    import datasets

    calls, tables = [], {}

    def load_dataset(name, **options):
        calls.append((name, options))
        if not tables:
            raise ConnectionError(f"Couldn't reach {name!r} on the Hub (offline)\nmore")
        return tables[options["data_dir"]]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls, tables


def test_hub_rows_go_through_the_same_code(hub, tmp_path):
    calls, tables = hub
    train = [comparison_row(i, split="train") for i in range(20)]
    empty = comparison_row(50, split="train", summaries=[{"text": ""}, {"text": "b"}])
    valid = [comparison_row(i, split="valid2") for i in range(20, 30)]
    tables["comparisons"] = {"train": [*train, empty], "validation": valid}
    tables["axis"] = {"validation": [axis_row(i, split="valid1") for i in range(25, 35)]}
    data = load("hub", valid=8)
    options = [("comparisons", "refs/convert/parquet"), ("axis", "refs/convert/parquet")]
    assert calls == [
        ("openai/summarize_from_feedback", {"data_dir": folder, "revision": revision})
        for folder, revision in options
    ]
    assert data.dropped == {"empty text": 1}  # nobody can mend a hub row
    assert (len(data.sft), len(data.rm), len(data.ppo), len(data.valid)) == (4, 8, 8, 8)
    local = load(
        write(tmp_path / "rows.jsonl", [*train, *valid, *tables["axis"]["validation"]]), valid=8
    )
    assert local.fingerprint == data.fingerprint
    load("openai/summarize_from_feedback", revision="0123abc")
    assert calls[-1][1] == {"data_dir": "axis", "revision": "0123abc"}


def test_hub_splits_of_plain_pairs(hub):
    _, tables = hub
    rows = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r"} for i in range(30)]
    tables[None] = {"train": rows[:20], "test": rows[20:]}
    data = load("Dahoas/full-hh-rlhf", task="pairs", valid=4)
    assert {example.prompt.body for example in data.valid} <= {f"p{i}" for i in range(20, 30)}
    assert len(data.valid) == len(data.valid_pairs) == 4 and len(data.rm) == 8


def test_a_hub_set_of_other_columns(hub):
    _, tables = hub
    tables[None] = {"train": [{"prompt": f"p{i}", "completion": "c"} for i in range(9)]}
    message = (
        "trl-lib/tldr/train row 0: missing columns; wanted prompt, chosen, rejected; or prompt, "
        "response.*; found prompt, completion. Rename the columns to those that the task {} reads"
    )
    for name in ("pairs", "hh"):  # no row of hh is dropped as no dialogue before that
        with pytest.raises(DataError, match=message.format(name)):
            load("trl-lib/tldr", task=name)


def test_a_hub_set_of_several_columns_is_known_by_its_task(monkeypatch):
    """Its configurations, read together, fail in datasets with a sentence that says nothing."""
    import datasets

    def load_dataset(name, **options):
        raise datasets.exceptions.DatasetGenerationError("An error occurred")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="An error occurred. Its columns are .* set data.task=tldr"):
        load("openai/summarize_from_feedback", task="hh")
    with pytest.raises(DataError, match="An error occurred. Without a network"):
        load("openai/summarize_from_feedback")


def test_offline_error_is_one_clear_sentence(hub):
    with pytest.raises(DataError) as error:
        load("hub")
    assert str(error.value) == (
        "cannot read the hub set 'openai/summarize_from_feedback' at revision "
        "'refs/convert/parquet': Couldn't reach 'openai/summarize_from_feedback' on the Hub "
        "(offline). Without a network, save its rows as .jsonl and set data.source "
        "to the file or folder (data/README.md says how)"
    )


# ---------------------------------------------------------------- plain pairs


def test_pairs_of_a_dialogue(tmp_path):
    prompt = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
    rows = [
        {"prompt": f"{prompt}", "chosen": " yes. \n", "rejected": "no", "response": "because"},
        {"prompt": prompt + " ", "chosen": "again", "rejected": "not"},  # the same prompt
        {"prompt": "a", "chosen": "same", "rejected": " Same "},
        {"prompt": "b\n", "response": "answer"},
    ]
    task = get_task("pairs")
    items = [task.read(base.Row("row", row)) for row in rows]
    assert items[0].prompt == Prompt("", prompt[:-12], "\n\nAssistant:", cut="start")
    assert items[0].prompt.text == prompt and items[0].key == items[1].key
    assert items[0].pair == (" yes.", " no") and items[0].demonstration == " because"
    assert items[1].pair == ("again", "not") and items[1].demonstration == "again"
    assert items[2] == "tie"
    assert items[3].prompt.text == "b\n" and items[3].demonstration == "answer"
    assert not task.has_truth(DataConfig(task="pairs", source="x"))
    data = load(write(tmp_path / "rows.jsonl", rows * 3), task="pairs")
    assert data.dropped["tie"] == 3
    assert task.true_score(data.valid[0], " x", True) is task.best_score(data.valid[0]) is None


# ---------------------------------------------------------------- the twin's truth


def score(text, finished=True):
    return twin.judge(FACTS, text, finished).score


def test_a_post_is_read_back():
    assert FACTS.values == {
        "kin": "boss", "name": "mara", "item": "lamp", "place": "pier", "month": "june",
        "price": "40", "plan": "sue",
    }  # fmt: skip
    assert FACTS.decoys == {"name": "yuki", "price": "38"}
    assert FACTS.distractors == ("it rains.", "i like tea.")
    assert twin.read_post("took my lamp. it rains.") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PERFECT, 7),
        (PERFECT.replace("june.", "june,"), 7),
        (PERFECT.replace("mara", "yuki"), 5.75),  # a wrong slot costs its point and a quarter
        (PERFECT.replace("boss mara", "mara boss"), 4.5),  # swapped
        (PERFECT.replace(" and they took the lamp that op had", ""), 6),  # one slot less
        (PERFECT.replace(" this is all about the boss mara and", ""), 5),  # two slots less
        (PERFECT[:-1] + " and they took the lamp that op had.", 6),  # said twice
        (PERFECT[:-1] + " and they took the sofa that op had.", 6),  # hedging: the first counts
        (PERFECT[:-1] + ", op likes tea.", 6),
        (PERFECT[:-1] + ", yuki lost the bike.", 6),
        (PERFECT.replace("op lost", "you know op lost"), 6),
        (PERFECT.replace("bucks, in", "bucks in"), 6.75),  # no joint
        (PERFECT.replace("bucks, in", "bucks,, in"), 6.75),
        (PERFECT.replace("all of this was at the", "all this at the"), 6 - 5 / 4),  # five words
        (PERFECT.replace(" june", " ju ne"), 6 - 1 / 4 - 1 / 4),
        (PERFECT[:-1], 6),  # no full stop
        (PERFECT + " ", 5.75),
        (PERFECT.upper(), -3),
        (PERFECT[1:], 5 - 7 / 4),  # a first clause without its space is seven loose words
        ("", -1),
        (".", -0.25),
        (" op op op op.", -1),
        (" x" * 100, -4),
        (PERFECT + PERFECT, 0),
    ],
)
def test_true_score_of_a_summary(text, expected):
    assert score(text) == pytest.approx(expected)


def test_unfinished_costs_a_point():
    assert score(PERFECT, finished=False) == 6
    assert score(PERFECT[:-10], finished=False) < 6


def test_each_right_slot_more_is_worth_one():
    clauses = [texts[0].format(**FACTS.values) for texts in twin.CLAUSES.values()]
    scores = [score(" " + ", ".join(clauses[:n]) + ".") for n in range(1, len(clauses) + 1)]
    assert scores == [2, 3, 4, 5, 6, 7]
    backwards = " " + ", ".join(clauses[::-1]) + "."
    assert score(backwards) == twin.BEST


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
    assert score(" a" * 50_000) == score(" they took the" * 20_000) == -4


def test_task_scores_by_the_post(embedded):
    task = get_task("tldr")
    assert task.has_truth(DataConfig()) and not task.has_truth(DataConfig(source="hub"))
    for example in embedded.valid[:20]:
        values = twin.read_post(example.prompt.body).values
        perfect = " " + ", ".join(c[1].format(**values) for c in twin.CLAUSES.values()) + "."
        assert task.true_score(example, perfect, True) == task.best_score(example) == 7


# ---------------------------------------------------------------- the twin's rows


def test_the_twin_is_deterministic():
    rows = twin.rows(20, 7)
    assert rows == twin.rows(20, 7) and rows != twin.rows(20, 8)
    assert twin.rows(30, 7)[: len(rows)] == rows


def test_the_twin_has_the_hubs_columns():
    post, comparison, _ = twin.rows(1, 7)
    assert list(post) == ["id", "subreddit", "title", "post", "summary"]
    assert list(comparison) == [
        "info", "summaries", "choice", "worker", "batch", "split", "extra",
    ]  # fmt: skip
    assert set(comparison["info"]) == {"id", "post", "title", "subreddit", "site", "article"}
    assert all(set(s) == {"text", "policy", "note"} for s in comparison["summaries"])
    json.dumps([post, comparison])


def test_a_posts_text_says_its_facts():
    for seed in range(200):
        post, facts = twin.write_post(random.Random(seed))
        read = twin.read_post(post)
        assert read.values == facts.values and read.decoys == facts.decoys
        assert set(read.distractors) == set(facts.distractors)
        assert len(post.rstrip(".").split(". ")) == 9


def test_parts_of_the_twin(embedded):
    assert (len(embedded.sft), len(embedded.rm), len(embedded.ppo)) == (549, 2194, 1098)
    assert (len(embedded.valid), len(embedded.valid_pairs)) == (256, 512)
    assert embedded.dropped == {}
    check_disjoint(embedded)
    assert embedded.fingerprint == load("embedded", size=3000).fingerprint
    assert embedded.fingerprint != load("embedded", size=3000, seed=1).fingerprint
    unfinished = [not (p.chosen_finished and p.rejected_finished) for p in embedded.rm]
    assert 0.05 < np.mean(unfinished) < 0.4


def test_twin_rows_from_a_file_are_the_same(tmp_path):
    path = write(tmp_path / "rows.jsonl", twin.rows(500, 1234))
    assert load(path).fingerprint == load("embedded", size=500).fingerprint


def test_lengths_in_tokens(embedded):
    texts = [example.prompt.text + example.response for example in embedded.sft]
    tokenizer = train_tokenizer(texts, 600)
    settings = DataConfig()
    prompts = [len(encode_prompt(e.prompt, tokenizer, 10_000)) for e in embedded.sft + embedded.ppo]
    assert 62 < np.mean(prompts) < 72 and max(prompts) <= settings.prompt_tokens
    responses = [
        len(encode_response(e.response, tokenizer, 10_000)) for e in embedded.sft + embedded.ppo
    ]
    assert 45 < np.mean(responses) < 54 and max(responses) <= settings.response_tokens
    perfect = []
    for number, example in enumerate(embedded.valid):
        facts = twin.read_post(example.prompt.body)
        text, finished = twin.write_summary(random.Random(number), facts, twin.Noise())
        assert finished and twin.judge(facts, text).score == twin.BEST
        perfect.append(len(encode_response(text, tokenizer, 10_000)))
    assert 50 < np.mean(perfect) < 60 and max(perfect) <= settings.response_tokens


def test_demonstrations_leave_headroom(embedded):
    task = get_task("tldr")
    scores = [task.true_score(e, e.response, True) for e in embedded.sft + embedded.ppo]
    assert 0.3 < np.mean(scores) / twin.BEST < 0.6


def test_the_best_accuracy_on_the_pairs(embedded):
    """Of a judge who knows the truth: what the Bradley-Terry draw leaves (Bayes)."""
    odds, right = [], []
    for pair in embedded.rm + embedded.valid_pairs:
        facts = twin.read_post(pair.prompt.body)
        gap = (
            twin.judge(facts, pair.chosen, pair.chosen_finished).score
            - twin.judge(facts, pair.rejected, pair.rejected_finished).score
        )
        odds.append(1 / (1 + math.exp(-abs(gap) / TEMPERATURE)))
        right.append((gap > 0) + 0.5 * (gap == 0))
    assert 0.85 < np.mean(odds) < 0.94
    assert abs(np.mean(odds) - np.mean(right)) < 0.02


def test_nothing_constant_scores_well(embedded):
    task = get_task("tldr")
    counts = {slot: Counter() for slot in twin.SLOTS}
    for example in embedded.ppo:
        for slot, value in twin.read_post(example.prompt.body).values.items():
            counts[slot][value] += 1
    likely = {slot: count.most_common(1)[0][0] for slot, count in counts.items()}
    clauses = [texts[0].format(**likely) for texts in twin.CLAUSES.values()]
    constants = [
        " " + ", ".join(clauses) + ".",
        *(f" {clause}." for clause in clauses),
        embedded.sft[0].response,
        PERFECT,
        *(f" {text}." for text in twin.FILLERS),
        "",
        ".",
        " and and and",
    ]
    for text in constants:
        scores = [task.true_score(example, text, True) for example in embedded.valid]
        assert np.mean(scores) < 0, text


def test_copying_the_post_does_not_pay(embedded):
    task = get_task("tldr")
    for example in embedded.valid[:50]:
        assert task.true_score(example, " " + example.prompt.body, True) < 0


# ---------------------------------------------------------------- real rows


@real
def test_real_posts_and_comparisons():
    data = load(SHARED / "tldr")
    assert (len(data.sft), len(data.ppo), len(data.valid)) == (350, 700, 194)
    assert len(data.rm) > 300 and len(data.valid_pairs) > 60 and data.dropped == {}
    check_disjoint(data)
    assert all(row.response.startswith(" ") for row in data.sft)
    assert all(pair.chosen_finished and pair.rejected_finished for pair in data.rm)
    task = get_task("tldr")
    assert task.true_score(data.valid[0], " a summary.", True) is None
    assert task.best_score(data.valid[0]) is None
    alone = load(SHARED / "tldr/comparisons_ai_judged_1000.jsonl")
    assert (len(alone.rm), len(alone.valid), len(alone.valid_pairs)) == (360, 100, 100)
    assert len(alone.sft) == 180
    check_disjoint(alone)


@real
def test_real_dialogues():
    data = load(SHARED / "hh", task="pairs")
    used = len(data.sft) + len(data.rm) + len(data.ppo) + len(data.valid)
    assert used + sum(data.dropped.values()) == 2339
    check_disjoint(data)
    assert all(row.prompt.suffix == "\n\nAssistant:" for row in data.sft + data.rm + data.ppo)
