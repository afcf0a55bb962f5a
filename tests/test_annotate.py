"""The annotation widget, its buttons pressed in Python."""

import json
import math

import pandas as pd
import pytest

from marlhf import winrates
from marlhf.annotate import Annotate, pair_id, read_answers, votes


@pytest.fixture
def pairs():
    return pd.DataFrame({
        "arm": "macro5", "label": "MA-PPO, n = 5", "reference": "token",
        "prompt": [f"post {i}" for i in range(12)],
        "response": [f"ours {i}" for i in range(12)],
        "reference_response": [f"theirs {i}" for i in range(12)],
    })  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers" / "tldr.jsonl"


def shown(widget):
    return [side.value for side in widget.sides]


def prefer(widget, words):
    """Presses the button of the side that shows `words`."""
    (index,) = [i for i, text in enumerate(shown(widget)) if words in text]
    widget.buttons["AB"[index]].click()


def test_whichever_side_it_stands_on_the_answer_is_the_arms(pairs, path):
    widget, sides = Annotate(pairs, path, "one"), []
    for _ in range(12):
        sides.append("ours" in shown(widget)[0])
        prefer(widget, "ours")
    assert 0 < sum(sides) < 12
    assert votes(path, pairs)["one"].tolist() == [1] * 12
    assert all(button.disabled for button in widget.buttons.values())
    assert "Thank you" in widget.prompt.value
    widget.answer("A")  # nothing is left to answer
    assert len(path.read_text().splitlines()) == 12


def test_each_answer_is_stored_before_the_next_pair_is_shown(pairs, path):
    widget = Annotate(pairs, path, "one")
    assert (widget.progress.value, widget.progress.max, widget.note.value) == (0, 12, "0 of 12")
    for number, answer in enumerate(("A", "B", "tie"), 1):
        pair, flipped = widget.current, widget.flipped(widget.current)
        widget.buttons[answer].click()
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == number
        sign = -1 if flipped else 1
        assert rows[-1] == {"annotator": "one", "pair": pair, "answer": answer,
                            "outcome": {"A": sign, "B": -sign, "tie": 0}[answer]}  # fmt: skip
        assert widget.note.value == f"{number} of 12"
        assert widget.current != pair


def test_it_goes_on_where_it_stopped(pairs, path):
    first = Annotate(pairs, path, "one")
    order = list(first.pairs)
    first.buttons["A"].click()
    first.buttons["tie"].click()
    with open(path, "a") as file:  # killed while it wrote
        file.write('{"annotator": "one", "pa')
    second = Annotate(pairs, path, "one")
    assert list(second.pairs) == order
    assert second.current == order[2]
    assert second.progress.value == 2
    second.buttons["B"].click()
    assert [json.loads(line)["pair"] for line in path.read_text().splitlines()] == order[:3]


def test_annotators_share_a_file_and_see_other_orders(pairs, path):
    one, two = (Annotate(pairs, path, name) for name in ("one", "two"))
    assert set(one.pairs) == set(two.pairs)
    assert list(one.pairs) != list(two.pairs)
    assert [one.flipped(p) for p in one.pairs] != [two.flipped(p) for p in one.pairs]
    for _ in range(12):
        prefer(one, "ours")
    for number in range(6):
        prefer(two, "theirs" if number == 0 else "ours")
    assert Annotate(pairs, path, "two").progress.value == 6
    table = winrates.agreements(votes(path, pairs)).iloc[0]
    assert (table["pairs"], table["agreement"]) == (6, pytest.approx(5 / 6))
    judged = {**votes(path, pairs), "RM score": [1] * 12}
    assert len(winrates.agreements(judged)) == 3


def test_back_asks_again_and_the_last_answer_counts(pairs, path):
    widget = Annotate(pairs, path, "one")
    assert widget.back.disabled
    pair = widget.current
    prefer(widget, "theirs")
    widget.back.click()
    assert widget.current == pair
    prefer(widget, "ours")
    assert widget.current != pair
    table = votes(path, pairs)["one"].dropna()
    assert table.tolist() == [1]
    assert len(read_answers(path)) == 1


def test_nothing_on_the_screen_tells_the_arms_apart(pairs, path):
    texts = pairs.assign(response="<script>alert(1)</script> & MA", prompt="a\nb")
    widget = Annotate(texts.head(1), path, "one")
    screen = "".join([widget.prompt.value, *shown(widget)])
    assert "&lt;script&gt;" in screen and "<script>" not in screen
    for word in ("macro5", "token", "n = 5"):
        assert word not in screen
    assert "mimebundle" not in repr(widget._repr_mimebundle_(include=None, exclude=None))


def test_bad_input_is_named(pairs, path):
    with pytest.raises(ValueError, match="no column 'reference_response'"):
        Annotate(pairs.drop(columns="reference_response"), path, "one")
    with pytest.raises(ValueError, match="who annotates"):
        Annotate(pairs, path, " ")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"annotator": "one"}\n{"annotator": "one", "pair": "x", "outcome": 1}\n')
    with pytest.raises(ValueError, match=r"tldr\.jsonl, line 1 is not an answer"):
        Annotate(pairs, path, "one")


def test_votes_stand_in_the_order_of_the_pairs(pairs, path):
    widget = Annotate(pairs, path, "one")
    pair = widget.current
    prefer(widget, "theirs")
    backwards = pairs.iloc[::-1]
    column = votes(path, backwards)["one"]
    assert list(column.index) == list(backwards.index)
    for index, row in backwards.iterrows():
        mine = pair_id(row) == pair
        assert column[index] == -1 if mine else math.isnan(column[index])
    assert votes(path.with_name("none.jsonl"), pairs).shape == (12, 0)
