"""What the embedded twins share: how they draw, read a template, and spoil a text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from random import Random

TEMPERATURE = 0.5  # of the Bradley-Terry draw: P(a over b) = sigmoid((a - b) / TEMPERATURE)


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


def pattern(template: str, group: str) -> str:
    """A template as a regular expression: its words each after one space, any word as a value."""
    words = [
        "([a-z0-9]+)" if word.startswith("{") else re.escape(word) for word in template.split()
    ]
    return f"(?P<{group}>{''.join(' ' + word for word in words)})(?![a-z0-9])"


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
