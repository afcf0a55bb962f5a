"""What the embedded twins share: a small grammar, read by hand, and clauses put into a text."""

import random
import re

import pytest

from marlhf.tasks.shared_twin import Grammar, closed, shorten, with_leads

GRAMMAR = Grammar(
    {
        "met": ("{who} saw {whom}", "they met"),
        "cost": ("it cost {price} bucks",),
        "aside": ("well",),
    },
    lead="aside",
    marks="¹²",
)


@pytest.mark.parametrize(
    ("text", "parts", "garbled", "ends"),
    [
        (" mara saw tom.", [("met", ["mara", "tom"], 0)], 0, True),
        (" and saw tom.", [("met", ["and", "tom"], 0)], 0, True),  # a clause before a joint
        (" they met and it cost 40 bucks.", [("met", [], 0), ("cost", ["40"], 13)], 0, True),
        (" they met, it cost 40 bucks", [("met", [], 0), ("cost", ["40"], 10)], 0, False),
        (" they met it cost 4 bucks.", [("met", [], 0), ("cost", ["4"], 9)], 1, True),  # no joint
        (" they met,. they met.", [("met", [], 0), ("met", [], 11)], 1, True),  # one too many
        (". they met.", [("met", [], 1)], 1, True),  # a joint before the first clause
        (" they met oddly.", [("met", [], 0)], 1, True),
        (" they metal.", [], 2, True),  # "they" and "metal": a clause ends where its word does
        (" well they met.", [("aside", [], 0), ("met", [], 5)], 0, True),
        (" well, they met.", [("aside", [], 0), ("met", [], 6)], 1, True),
        (" they met well they met.", [("met", [], 0), ("aside", [], 9), ("met", [], 14)], 1, True),
        (
            " they met¹².",
            [("met", [], 0), ("citation", ["¹"], 9), ("citation", ["²"], 10)],
            0,
            True,
        ),
        (" they met.¹", [("met", [], 0)], 1, False),  # cites nothing
        (" well¹ they met.", [("aside", [], 0), ("met", [], 6)], 1, True),
        ("", [], 0, False),
    ],
)
def test_a_grammar_reads_a_text(text, parts, garbled, ends):
    assert GRAMMAR.read(text) == (parts, garbled, ends)


def test_without_marks_a_citation_is_a_word_it_does_not_know():
    plain = Grammar({"met": ("they met",)}, lead="aside")
    assert plain.read(" they met¹.") == ([("met", [], 0)], 1, True)


VALUES = {"who": ["mara", "tom"], "what": ["boss"]}


def test_a_closed_template_takes_a_slots_own_values():
    regex = re.compile(closed("{who} (the {what}).", VALUES, "a"))
    assert regex.fullmatch("tom (the boss).").groupdict() == {"a_who": "tom", "a_what": "boss"}
    assert not regex.fullmatch("ella (the boss).") and not regex.fullmatch("tom (the boss)!")


def test_leads_and_length():
    rng, clauses = random.Random(0), ["a b", "c", "d e f"]
    assert with_leads(rng, clauses, ("well",), 1.0) == ["well a b", "well c", "well d e f"]
    assert with_leads(rng, clauses, ("well",), 0.0) == clauses
    shorten(rng, clauses, 6)
    assert clauses == ["a b", "c", "d e f"]  # six words are not too many
    left = set()
    for _ in range(50):
        kept = list(clauses)
        shorten(rng, kept, 5)
        left.add(tuple(kept))
    assert left == {("c", "d e f"), ("a b", "d e f"), ("a b", "c")}  # any may go
