"""Termination conditions: hand-worked rows, a plain-Python reference over ragged batches, and what
must not matter (padding, the rest of the batch, precision, where the device is)."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marlhf.segment import (
    TERMINATIONS,
    FixedNgram,
    Perplexity,
    RandomNgram,
    Token,
    Whole,
    check_segments,
    from_starts,
    make_segmenter,
    valid_index,
)

NAN = float("nan")
T, F = True, False
ALL = [Token(), FixedNgram(3), RandomNgram(), Perplexity(), Perplexity("neighbour"), Whole()]


def rows(*lists):
    return torch.tensor(lists)


def full(columns, batch=1):
    return torch.zeros(batch, columns, dtype=torch.long), torch.ones(batch, columns, dtype=bool)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def logprobs(*perplexities):
    """Per-token perplexities exp(-log p) of one row -> log p [1, T]."""
    return -torch.tensor([perplexities], dtype=torch.float32).log()


@st.composite
def batches(draw, max_rows=4, max_columns=24):
    """Masks with padding anywhere (holes, empty rows) and log-probabilities with many ties: roots
    of primes, whose mean is one of them only if all are alike, so that rounding decides nothing."""
    shape = draw(st.integers(1, max_rows)), draw(st.integers(1, max_columns))
    size = shape[0] * shape[1]
    mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    primes = st.sampled_from([2.0, 3.0, 5.0, 7.0, 11.0, 13.0])
    loss = draw(st.lists(primes, min_size=size, max_size=size))
    return torch.tensor(mask).view(shape), -torch.tensor(loss).view(shape).sqrt()


# Hand-worked


def test_token_numbers_valid_tokens():
    mask = rows([F, T, T, F, T], [T, T, T, T, T], [F, F, F, F, F])
    segments = Token()(torch.zeros(3, 5), mask)
    assert segments.tolist() == [[-1, 0, 1, -1, 2], [0, 1, 2, 3, 4], [-1] * 5]
    assert segments.dtype == torch.int64


def test_fixed_ngram_counts_valid_tokens_only():
    mask = rows([T] * 8, [F, F, T, T, T, T, F, F], [T, F, T, T, F, T, T, T])
    expected = [
        [0, 0, 0, 1, 1, 1, 2, 2],
        [-1, -1, 0, 0, 0, 1, -1, -1],
        [0, -1, 0, 0, -1, 1, 1, 1],
    ]
    assert FixedNgram(3)(torch.zeros(3, 8), mask).tolist() == expected


def test_fixed_ngram_five_at_its_multiples():
    """No macro action is empty and the last token is not one of its own (unlike the official
    code)."""
    for length, lengths in [(4, [4]), (5, [5]), (6, [5, 1]), (10, [5, 5]), (11, [5, 5, 1])]:
        segments = FixedNgram()(*full(length))
        assert segments[0].bincount().tolist() == lengths


def test_whole_is_one_macro_action():
    mask = rows([F, T, T, F, T], [F] * 5)
    assert Whole()(torch.zeros(2, 5), mask).tolist() == [[-1, 0, 0, -1, 0], [-1] * 5]


@pytest.mark.parametrize("reading", ["cumulative", "neighbour"])
def test_perplexity_splits_where_it_rises(reading):
    """[5 4 3] [6 2]; one token early, as in the official code, would be [5 4] [3 6] [2]."""
    tokens, mask = full(5)
    segments = Perplexity(reading)(tokens, mask, ref_logprobs=logprobs(5, 4, 3, 6, 2))
    assert segments.tolist() == [[0, 0, 0, 1, 1]]


def test_perplexity_readings_differ_below_the_mean():
    """16, 2, 4: the last token is above its neighbour and below the mean so far, sqrt(32)."""
    tokens, mask = full(3)
    ref = logprobs(16, 2, 4)
    assert Perplexity("cumulative")(tokens, mask, ref_logprobs=ref).tolist() == [[0, 0, 0]]
    assert Perplexity("neighbour")(tokens, mask, ref_logprobs=ref).tolist() == [[0, 0, 1]]


def test_perplexity_begins_anew_at_each_macro_action():
    """2, 16, 6: the last token is above the perplexity of the row so far, sqrt(32) = 5.7, and below
    that of its own macro action, 16."""
    tokens, mask = full(3)
    segments = Perplexity()(tokens, mask, ref_logprobs=logprobs(2, 16, 6))
    assert segments.tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("reading", ["cumulative", "neighbour"])
@pytest.mark.parametrize("logprob", [-0.1, -0.7, -1e-7, 0.0])
def test_perplexity_ties_do_not_split(reading, logprob):
    tokens, mask = full(300)
    ref = torch.full((1, 300), logprob)
    assert Perplexity(reading)(tokens, mask, ref_logprobs=ref).max() == 0


@pytest.mark.parametrize("reading", ["cumulative", "neighbour"])
def test_perplexity_skips_holes_and_leading_padding(reading):
    mask = rows([F, T, F, T, T, F, T, T, F])
    ref = logprobs(NAN, 5, NAN, 4, 3, NAN, 6, 2, NAN)
    segments = Perplexity(reading)(torch.zeros(1, 9), mask, ref_logprobs=ref)
    assert segments.tolist() == [[-1, 0, -1, 0, 0, -1, 1, 1, -1]]


def test_valid_index_by_hand():
    mask = rows([F, T, T, F, T], [T, F, F, T, F])
    assert valid_index(mask).tolist() == [[-1, 0, 1, 1, 2], [0, 0, 0, 1, 1]]


def test_from_starts_always_starts_a_row():
    mask = rows([F, T, T, T, F, T], [T, T, F, F, T, T])
    starts = rows([T, F, T, F, T, F], [F, F, T, T, F, T])
    assert from_starts(starts, mask).tolist() == [[-1, 0, 1, 1, -1, 1], [0, 0, -1, -1, 0, 1]]


# Random n-grams


def test_random_ngram_uses_every_length_and_leaves_one_macro_action_over():
    """2 + 3 + 5 + 10 = 20 tokens, three times; 7 more are one macro action."""
    tokens, mask = full(67, batch=50)
    segments = RandomNgram()(tokens, mask, generator=seeded(0))
    orders = set()
    for row in segments:
        *lengths, rest = row.bincount().tolist()
        assert sorted(lengths) == sorted([2, 3, 5, 10] * 3)
        assert rest == 7
        orders.add(tuple(lengths))
    assert len(orders) > 45  # every row has its own order


def test_random_ngram_orders_are_uniform():
    """Each of the six orders of 1, 2, 3 in a sixth of the rows (6 standard errors)."""
    tokens, mask = full(6, batch=6000)
    segments = RandomNgram((1, 2, 3), repeats=1)(tokens, mask, generator=seeded(1))
    _, counts = segments.unique(dim=0, return_counts=True)
    assert len(counts) == 6
    assert (counts - 1000).abs().max() < 6 * (1000 * 5 / 6) ** 0.5


def test_random_ngram_short_rows_cut_the_same_draw():
    """A row's draw does not depend on how many tokens it has, nor on the width of the batch."""
    tokens, mask = full(67, batch=3)
    long = RandomNgram()(tokens, mask, generator=seeded(3))
    ragged = mask & (torch.arange(67) < torch.tensor([[67], [30], [9]]))
    short = RandomNgram()(tokens, ragged, generator=seeded(3))
    narrow = RandomNgram()(tokens[:, :40], mask[:, :40], generator=seeded(3))
    assert torch.equal(short, long.masked_fill(~ragged, -1))
    assert torch.equal(narrow, long[:, :40])


def test_random_ngram_with_a_generator_a_row_ignores_the_batch():
    tokens, mask = full(67, batch=4)
    seeds = [5, 6, 7, 8]

    def draw(seeds):
        count = len(seeds)
        return RandomNgram()(tokens[:count], mask[:count], generator=list(map(seeded, seeds)))

    together = draw(seeds)
    assert not torch.equal(together[0], together[1])
    assert torch.equal(draw(seeds[::-1]), together.flip(0))
    assert torch.equal(draw([7]), together[2:3])


def test_random_ngram_is_a_function_of_its_generator():
    tokens, mask = full(67, batch=2)

    def draw(seed):
        return RandomNgram()(tokens, mask, generator=seeded(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(4)
    first = RandomNgram()(tokens, mask)
    torch.manual_seed(4)
    assert torch.equal(first, RandomNgram()(tokens, mask))


def test_random_ngram_wants_a_generator_for_every_row():
    with pytest.raises(ValueError, match="1 generators for 2 rows"):
        RandomNgram()(*full(4, batch=2), generator=[torch.Generator()])


# Against the reference, over ragged batches


@given(batches(), st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_fixed_matches_reference(batch, n):
    mask, _ = batch
    for segmenter, length in ((FixedNgram(n), n), (Token(), 1), (Whole(), mask.shape[1])):
        segments = segmenter(torch.zeros(mask.shape), mask)
        expected = [reference.segments_from_lengths([length] * 99, row) for row in mask.tolist()]
        assert segments.tolist() == expected


@given(batches())
@settings(max_examples=60, deadline=None)
def test_random_matches_reference(batch):
    """The lengths are read from a full row of the same draw, one token longer than their sum."""
    mask, _ = batch
    segmenter = RandomNgram((1, 2, 3), repeats=2)

    def draw(mask):
        return segmenter(torch.zeros(mask.shape), mask, generator=seeded(2))

    lengths = [row.bincount().tolist()[:-1] for row in draw(torch.ones(mask.shape[0], 13).bool())]
    expected = map(reference.segments_from_lengths, lengths, mask.tolist())
    assert draw(mask).tolist() == list(expected)


@given(batches(), st.sampled_from(["cumulative", "neighbour"]))
@settings(max_examples=150, deadline=None)
def test_perplexity_matches_reference(batch, reading):
    mask, ref = batch
    segments = Perplexity(reading)(torch.zeros(mask.shape), mask, ref_logprobs=ref)
    expected = [
        reference.perplexity_segments(*row, reading)
        for row in zip(ref.tolist(), mask.tolist(), strict=True)
    ]
    assert segments.tolist() == expected


# What every termination condition owes


@pytest.mark.parametrize("segmenter", ALL, ids=repr)
@given(batches())
@settings(max_examples=25, deadline=None)
def test_rules_hold_whatever_the_padding_order_and_dtype(segmenter, batch):
    """The rules of `segments` hold; padding of whatever content, the order of the batch and the
    dtype of the mask change nothing."""
    mask, ref = batch
    tokens = torch.zeros(mask.shape, dtype=torch.long)

    def draw(tokens, mask, ref, seeds=None):
        seeds = range(len(mask)) if seeds is None else seeds
        generators = [seeded(seed) for seed in seeds]
        return segmenter(tokens, mask, ref_logprobs=ref, generator=generators)

    segments = draw(tokens, mask, ref)
    check_segments(segments, mask)
    assert torch.equal(draw(tokens, mask.long(), ref.masked_fill(~mask, NAN)), segments)
    back = range(len(mask) - 1, -1, -1)
    assert torch.equal(draw(tokens.flip(0), mask.flip(0), ref.flip(0), back), segments.flip(0))
    wide = torch.nn.functional.pad
    padded = draw(wide(tokens, (3, 2)), wide(mask, (3, 2)), wide(ref, (3, 2), value=NAN))
    assert torch.equal(padded[:, 3:-2], segments)
    assert (padded[:, :3] == -1).all()
    assert (padded[:, -2:] == -1).all()


@pytest.mark.parametrize("segmenter", ALL, ids=repr)
def test_bfloat16_logprobs_are_compared_in_float32(segmenter):
    tokens, mask = full(60, batch=8)
    ref = -torch.rand(8, 60, generator=seeded(0)).bfloat16() * 8
    low, high = (
        segmenter(tokens, mask, ref_logprobs=each, generator=seeded(0))
        for each in (ref, ref.float())
    )
    assert torch.equal(low, high)


@pytest.mark.parametrize("segmenter", ALL, ids=repr)
def test_host_never_waits_for_the_device(segmenter):
    """A meta tensor has no contents: whatever needs them on the host raises."""
    tokens = torch.zeros(3, 20, device="meta")
    mask = torch.ones(3, 20, dtype=torch.bool, device="meta")
    segments = segmenter(tokens, mask, ref_logprobs=tokens)
    assert (segments.shape, segments.dtype, segments.device.type) == ((3, 20), torch.int64, "meta")


@pytest.mark.parametrize("segmenter", ALL, ids=repr)
def test_empty_batches(segmenter):
    for shape in ((0, 5), (3, 0), (0, 0)):
        empty = torch.zeros(shape)
        assert segmenter(empty, empty.bool(), ref_logprobs=empty).shape == shape


# The rules, and errors


@pytest.mark.parametrize(
    "segments, message",
    [
        ([[0, 0, 1, -1], [1, 1, 2, -1]], "row 1, token 0: found 1, but a row's first valid token"),
        ([[0, 0, 1, -1], [0, 2, 2, -1]], "row 1, token 1: found 2, but after 0 only 0 or 1"),
        ([[0, 1, 0, -1], [0, 1, 2, -1]], "row 0, token 2: found 0, but after 1 only 1 or 2"),
        ([[0, 0, 1, -1], [0, 0, 1, 1]], "row 1, token 3: found 1, but padding needs -1"),
        ([[0, 0, 1, -2], [0, 0, 1, -1]], "row 0, token 3: found -2, but padding needs -1"),
        ([[0, -1, 1, -1], [0, 0, 1, -1]], "row 0, token 1: found -1, but a valid token"),
        ([[-1, 0, 1, -1], [0, 0, 1, -1]], "row 0, token 0: found -1, but a valid token"),
    ],
)
def test_check_segments_names_the_bad_row(segments, message):
    mask = rows([T, T, T, F], [T, T, T, F])
    check_segments(rows([0, 0, 1, -1], [0, 1, 2, -1]), mask)
    with pytest.raises(ValueError, match=message):
        check_segments(torch.tensor(segments), mask)


def test_check_segments_looks_across_holes():
    mask = rows([F, T, F, T, F, T])
    check_segments(rows([-1, 0, -1, 0, -1, 1]), mask)
    with pytest.raises(ValueError, match="row 0, token 5: found 2, but after 0"):
        check_segments(rows([-1, 0, -1, 0, -1, 2]), mask)


def test_check_segments_wants_int64_of_the_masks_shape():
    mask = torch.ones(1, 2, dtype=bool)
    with pytest.raises(ValueError, match="int32"):
        check_segments(torch.zeros(1, 2, dtype=torch.int32), mask)
    with pytest.raises(ValueError, match=r"\[1, 3\]"):
        check_segments(torch.zeros(1, 3, dtype=torch.int64), mask)
    check_segments(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, dtype=bool))


@given(batches(), st.data())
@settings(max_examples=80, deadline=None)
def test_check_segments_agrees_with_the_rule(batch, data):
    """One entry of right segments changed: an error exactly if the rule, spelled out, is broken."""
    mask, _ = batch
    segments = FixedNgram(2)(torch.zeros(mask.shape), mask)
    row = data.draw(st.integers(0, mask.shape[0] - 1))
    segments[row, data.draw(st.integers(0, mask.shape[1] - 1))] = data.draw(st.integers(-2, 9))
    ids, valid = segments[row].tolist(), mask[row].tolist()
    on_mask = [i for i, v in zip(ids, valid, strict=True) if v]
    right = all(i == -1 for i, v in zip(ids, valid, strict=True) if not v)
    right &= all(b - a in (0, 1) for a, b in zip([0, *on_mask], on_mask, strict=False))
    right &= on_mask[:1] in ([], [0])
    if right:
        check_segments(segments, mask)
    else:
        with pytest.raises(ValueError, match=f"row {row}, "):
            check_segments(segments, mask)


def test_make_segmenter_takes_what_it_needs_from_one_config():
    everything = {"n": 7, "lengths": [1, 4], "repeats": 2, "reading": "neighbour"}
    assert {name: make_segmenter(name, **everything) for name in TERMINATIONS} == {
        "token": Token(),
        "fixed": FixedNgram(7),
        "random": RandomNgram((1, 4), 2),
        "perplexity": Perplexity("neighbour"),
        "whole": Whole(),
    }
    assert make_segmenter("fixed") == FixedNgram(5)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="termination: there is no 'fixd'; the nearest is 'fixed'"):
        make_segmenter("fixd")
    with pytest.raises(ValueError, match="'repeat'; the nearest is 'repeats'"):
        make_segmenter("random", repeat=3)
    with pytest.raises(ValueError, match="reading: there is no 'neighbor'"):
        Perplexity("neighbor")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FixedNgram(0), "n: must be at least 1, got 0"),
        (lambda: FixedNgram(2.5), "n: must be a whole number of tokens, got 2.5"),
        (lambda: RandomNgram(()), "lengths: give at least one"),
        (lambda: RandomNgram((2, 0)), "lengths: must be at least 1, got 0"),
        (lambda: RandomNgram(repeats=0), "repeats: must be at least 1, got 0"),
        (lambda: Perplexity()(*full(3)), "Perplexity needs ref_logprobs.*it got none"),
        (
            lambda: Perplexity()(*full(3), ref_logprobs=torch.zeros(1, 4)),
            r"of shape \[1, 3\]; it got \[1, 4\]",
        ),
        (lambda: Token()(torch.zeros(1, 3), torch.ones(1, 4)), r"\[1, 3\] and \[1, 4\]"),
        (lambda: Token()(torch.zeros(3), torch.ones(3)), r"must both be \[B, T\]"),
    ],
)
def test_bad_settings_and_inputs(make, message):
    with pytest.raises(ValueError, match=message):
        make()
