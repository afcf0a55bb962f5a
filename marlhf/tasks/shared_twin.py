"""What the embedded twins share: draws, the grammar that reads a text, clauses put into a text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

TEMPERATURE = 0.5  # of the Bradley-Terry draw: P(a over b) = sigmoid((a - b) / TEMPERATURE)

# ---------------------------------------------------------------- draws


def pick(rng: Random, values: Sequence):
    """One of the values, each as likely."""
    return values[int(rng.random() * len(values))]


def pick_other(rng: Random, values: Sequence, *taken):
    """One of the values that is not among those taken."""
    while (value := pick(rng, values)) in taken:
        pass
    return value


def prefers_first(rng: Random, first: float, second: float) -> bool:
    """The draw between two scores: P = sigmoid((first - second) / TEMPERATURE)."""
    return rng.random() < 1 / (1 + math.exp((second - first) / TEMPERATURE))


# ---------------------------------------------------------------- reading


class Reading(NamedTuple):
    """A text as a grammar reads it.

    parts: the clauses that it knows, and their citations: kind, values of the template's slots in
    their order (of a citation its mark), and where the part begins in the text.
    """

    parts: list[tuple[str, list[str], int]]
    garbled: int  # words that the grammar does not know, joints that are missing or too many
    ends: bool  # with a full stop


class Grammar:
    """Clauses with one joint (a comma, " and" or a full stop) between any two, and a full stop.

    clauses: their templates by kind. lead: the kind that opens a clause, with no joint after it.
    marks: characters of which each, behind a clause, is a citation.
    """

    def __init__(self, clauses: dict[str, Sequence[str]], lead: str, marks: str = ""):
        named = {
            f"{kind}_{i}": (kind, template)
            for kind, templates in clauses.items()
            for i, template in enumerate(templates)
        }
        known = "|".join(_open(template, group) for group, (_, template) in named.items())
        patterns = [
            f"(?= )(?:{known})",  # where no space is, none of them is tried: for speed alone
            *([f"(?P<citation>[{marks}])"] if marks else []),
            r"(?P<joint> and(?![a-z0-9])|[,.])",
            rf"(?P<garbled>\s*[^\s,.{marks}]+|\s+)",
        ]
        self._regex = re.compile("|".join(patterns))
        self._lead = lead
        self._clauses = {}  # by the clause's group: its kind, and the numbers of its values' groups
        for group, (kind, template) in named.items():
            first = self._regex.groupindex[group] + 1  # they follow the clause's own
            self._clauses[group] = kind, range(first, first + template.count("{"))

    def read(self, text: str) -> Reading:
        """Reads any text; never raises."""
        parts, garbled, last = [], 0, "start"
        for match in self._regex.finditer(text):
            group = match.lastgroup
            if group == "garbled":
                garbled += 1
                last = ""
            elif group == "joint":
                garbled += last not in ("", "clause")  # after a joint or a lead, or at the start
                last = match[0]
            elif group == "citation":
                if last == "clause":
                    parts.append((group, [match[0]], match.start()))
                else:
                    garbled += 1
            else:
                kind, slots = self._clauses[group]
                garbled += last in ("", "clause")  # no joint before it
                parts.append((kind, [match[slot] for slot in slots], match.start()))
                last = "lead" if kind == self._lead else "clause"
        return Reading(parts, garbled, last == "." and text.endswith("."))


def _open(template: str, group: str) -> str:
    """A template as a regular expression: its words each after one space, any word as a value."""
    words = [
        "([a-z0-9]+)" if word.startswith("{") else re.escape(word) for word in template.split()
    ]
    return f"(?P<{group}>{''.join(' ' + word for word in words)})(?![a-z0-9])"


def closed(template: str, values: dict[str, Sequence[str]], group: str) -> str:
    """A template as a regular expression: only a slot's own values, in groups `group`_`slot`."""
    pieces = re.split(r"{(\w+)}", template)
    texts = [re.escape(piece) for piece in pieces]
    for i in range(1, len(pieces), 2):
        texts[i] = f"(?P<{group}_{pieces[i]}>{'|'.join(values[pieces[i]])})"
    return "".join(texts)


# ---------------------------------------------------------------- writing


def with_leads(
    rng: Random, clauses: Sequence[str], leads: Sequence[str], chance: float
) -> list[str]:
    """The clauses, each with one of the leads before it at that chance."""
    return [f"{pick(rng, leads)} {c}" if rng.random() < chance else c for c in clauses]


def shorten(rng: Random, clauses: list[str], longest: int) -> None:
    """Takes out clauses, each as likely, until no more than `longest` words are left."""
    while sum(clause.count(" ") + 1 for clause in clauses) > longest:
        clauses.pop(int(rng.random() * len(clauses)))


def join(rng: Random, clauses: Sequence[str]) -> str:
    """Clauses in at most two sentences, with one connector between any two."""
    stop = int(rng.random() * 2 * len(clauses))  # the clause before which a sentence ends, if any
    text = " " + clauses[0]
    for index, clause in enumerate(clauses[1:], 1):
        text += ("." if index == stop else pick(rng, (",", " and"))) + " " + clause
    return text + "."


def spoil(rng: Random, text: str, mangle: float, cut: float) -> tuple[str, bool]:
    """The text with a word mangled or the end cut off, at these chances; and if it ends."""
    if rng.random() < mangle:
        words = text.split(" ")
        index = 1 + int(rng.random() * (len(words) - 1))
        words[index] = _mangled(rng, words[index], words)
        text = " ".join(words)
    if rng.random() < cut:
        return text[: 20 + int(rng.random() * (len(text) - 20))], False
    return text, True


def _mangled(rng: Random, word: str, words: list[str]) -> str:
    """A word spoiled as a small language model does: broken off, run into another, or doubled."""
    half = len(word) // 2 + 1
    return pick(rng, (word[:half], word[:half] + pick(rng, words)[-3:], f"{word} {word}", ""))
