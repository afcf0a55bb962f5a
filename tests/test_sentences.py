"""Lesson 2's sentences: the counting model, the made-up critic, and HTML that says what it should
without colours, scripts or a mouse."""

import html
import re
from html.parser import HTMLParser

import pytest
import torch

from marlhf import sentences
from marlhf.config import load_config
from marlhf.macro import macro_gae
from marlhf.segment import FixedNgram, Perplexity, RandomNgram, Token, Whole, check_segments
from marlhf.tasks import get_task, tldr_twin
from marlhf.text import encode_response, train_tokenizer


@pytest.fixture(scope="module")
def sentence():
    data = get_task("tldr").load(load_config("tldr-smoke").data)
    tokenizer = train_tokenizer([e.prompt.text + e.response for e in data.sft], 400)
    rows = [encode_response(e.response, tokenizer, 1000) for e in data.sft]
    model = sentences.CountingModel(rows, len(tokenizer))
    return sentences.make_sentence(data.valid[0], tokenizer, model, model)


class Reader(HTMLParser):
    """Text, tags and titles of a piece of HTML; open tags must be closed."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.titles, self.text = [], set(), [], ""
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.tags.add(tag)
        self.titles += [value for name, value in attributes if name == "title"]
        assert {name for name, _ in attributes} <= {"style", "title"}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


# The counting model and the critic


def test_counts_by_hand():
    model = sentences.CountingModel([[0, 1], [0, 1], [0, 0]], vocabulary=2, order=1)
    # alone: 0 four times of six, smoothed with 1/2; first in a row: 0 three times of three
    p0, p1 = (4 + 0.5) / 7, (2 + 0.5) / 7
    expected = torch.tensor([(3 + p0) / 4, (2 + p1) / 4]).double().log()
    torch.testing.assert_close(model.logprobs([0, 1]), expected)


def test_counts_sum_to_one_after_any_context():
    model = sentences.CountingModel([[0, 1, 2, 1], [2, 2], [1]], vocabulary=3, order=2)
    for context in ([], [0], [0, 1], [2, 2], [1, 0]):
        total = sum(float(model.logprobs([*context, a])[-1].exp()) for a in range(3))
        assert total == pytest.approx(1)


def test_critic_reads_along():
    facts = tldr_twin.Facts({slot: values[0] for slot, values in tldr_twin.VALUES.items()}, {}, ())
    place, other = facts.values["place"], tldr_twin.VALUES["place"][1]
    start = " all of this was at the "
    prefixes = [
        "",
        start + place[:2],
        start + place,
        start + other,
        start + place + ", you know op",
    ]
    none, half, right, wrong, chatter = sentences.made_up_values(prefixes, facts)[0].tolist()
    assert none == half == pytest.approx(7 * sentences.AHEAD)
    assert right == pytest.approx(none + 1 - sentences.AHEAD)
    assert wrong == pytest.approx(none - 1 - sentences.AHEAD)
    assert chatter == pytest.approx(right - 0.5)


# HTML


def test_boundaries_need_no_colour(sentence):
    for segmenter in (Token(), FixedNgram(4), RandomNgram(), Perplexity(), Whole()):
        segments = sentence.cut(segmenter)
        check_segments(segments, sentence.mask)
        count = int(segments.max()) + 1
        shown = Reader(sentences.splits(sentence, {"name": segments}).html)
        assert shown.text.count(sentences.BAR) == len(shown.titles) == count
        assert "".join(sentence.pieces) in shown.text.replace(sentences.BAR, "")
        assert not shown.tags & {"script", "style", "input"}


def test_random_cut_repeats_and_differs_by_seed(sentence):
    one, again, other = (sentence.cut(RandomNgram(), seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_numbers_are_those_of_macro_gae(sentence):
    segments = sentence.cut(FixedNgram(4))
    shown = sentences.credited(sentence, segments, lam=0.9)
    rewards = sentence.rewards(0.05)
    found, returns = macro_gae(rewards, sentence.values, segments, 1.0, 0.9)
    reader = Reader(shown.html)
    tokens = [title for title in reader.titles if title.startswith("token ")]
    assert len(tokens) == sentence.tokens.shape[1]
    for t, title in enumerate(tokens):
        for name, x in (("advantage", found), ("return", returns)):
            (number,) = re.findall(rf"{name} ([+−][\d.]+)", title)
            assert float(number.replace("−", "-")) == pytest.approx(float(x[0, t]), abs=0.0051)
        assert f"value {sentences._signed(sentence.values[0, t])}\n" in title
    assert {"details", "summary", "table"} <= reader.tags  # the same numbers without a mouse
    assert len(shown.text.splitlines()) == int(segments.max()) + 2


def test_text_is_escaped():
    one = torch.zeros(1, 1)
    sentence = sentences.Sentence((' <b>&"',), one.long(), one, one, one, 0.0)
    segments = sentence.cut(Whole())
    for shown in (
        sentences.splits(sentence, {"a < b": segments}),
        sentences.credited(sentence, segments),
    ):
        assert html.escape('<b>&"') in shown.html
        assert '<b>&"' in Reader(shown.html).text


def test_pictures_say_what_they_show(sentence):
    cuts = {"cumulative": sentence.cut(Perplexity()), "whole": sentence.cut(Whole())}
    assert "whole begins at 0." in sentences.surprise(sentence, cuts).alt
    drawn = sentences.credit(sentence, cuts, 0.95, 0.05)
    whole = sentence.rewards(0.05).sum() - sentence.values.mean()
    assert f"whole from {whole:.2f} to {whole:.2f}" in drawn.alt
    assert drawn.png().startswith(b"\x89PNG")
