"""The embedded twin of the WebGPT task: questions with quoted sources, answers, a hidden truth.

A question asks for six things about an event, one of them first, and brings its sources in any
order: a short quote with a footnote mark for each thing asked, one for a thing that was not asked,
and in some questions a rumor that contradicts one of them. An answer makes statements. Each should
be about something asked, be supported by a quote, and cite it ("it is held at the pier³"); what was
asked first comes first. Two of the eight things there are, the rare ones, are seldom asked.

The hidden scorer (`judge`) reads the text of an answer with a strict grammar:

    score = supported - (unsupported + miscited) / 4 - uncited - repeated - irrelevant - claims
            - hedges - late / 2 - min(garbled / 4, 3) - unfinished

It makes the preferences, through a Bradley-Terry draw, and is the true score shown beside the
reward model's; nothing is trained on it. Rows are in the columns of openai/webgpt_comparisons. That
an answer was finished is said by its tokens: tokens_i.completion holds the end token alone, or
nothing where the answer was cut off.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from marlhf.tasks.shared_twin import (
    Grammar,
    closed,
    pick,
    pick_other,
    prefers_first,
    shorten,
    spoil,
    with_leads,
)

DATASET = "twin"  # question.dataset of the twin's rows
END = 0  # the end token in their tokens_i.completion
PAIRS_PER_QUESTION = 2
TIES = 0.1  # share of the comparisons in which the reader would not choose
ASKED = 6
BEST = float(ASKED)
MARKS = "⁰¹²³⁴⁵⁶⁷⁸⁹"  # of the sources, from 1
UNSUPPORTED = "⁰"  # in a source's place
ASKS_RARE = 0.1  # share of the questions that ask for a rare thing in a usual one's place
RUMOR = 0.4  # share of the questions with a rumor
TAKES_RUMOR = 0.4  # share of the wrong values that are the rumor's, where there is one
LONGEST = 52  # words of an answer

EVENTS = ("fair", "concert", "race", "market", "parade", "festival", "dance", "quiz", "feast")
VALUES = {
    "cost": " ".join(str(cost) for cost in range(12, 52, 2)),
    "place": "pier gym park zoo farm beach barn bank mall dock lake camp port cafe depot hotel "
    "tower arena plaza club",
    "month": "january february march april may june july august september october november "
    "december",
    "host": "mara tom ella omar hugo lena ivan rosa kofi yuki gita erik nina paul vera finn ruth "
    "igor maya sven",
    "prize": "lamp bike tent sofa ring drum vase harp boat desk kite rug radio flute clock sword",
    "food": "soup rice cake stew pie bread fish plums curry beans cheese jam",
    "gear": "coat hat spoon towel torch map cup rope scarf mask",
    "music": "jazz rock folk soul blues opera polka tango swing disco",
}
VALUES = {thing: words.split() for thing, words in VALUES.items()}
THINGS = tuple(VALUES)
USUAL, RARE = THINGS[:ASKED], THINGS[ASKED:]

# A quote for each statement, in two wordings; the mark follows its last word.
QUOTES = {
    "cost": ("tickets cost {cost} bucks", "entry is {cost} bucks"),
    "place": ("it is at the {place}", "come to the {place}"),
    "month": ("held in {month}", "set for {month}"),
    "host": ("it is run by {host}", "ask for {host}"),
    "prize": ("win a {prize}", "first gets a {prize}"),
    "food": ("they serve {food}", "eat some {food}"),
    "gear": ("bring a {gear}", "take a {gear}"),
    "music": ("they play {music}", "hear some {music}"),
}
STATEMENTS = {
    "cost": ("you have to pay {cost} bucks", "the price of it is {cost} bucks"),
    "place": ("it is held at the {place}", "you will find it at the {place}"),
    "month": ("it will take place in {month}", "the whole thing is in {month}"),
    "host": ("the one in charge is {host}", "all of it is run by {host}"),
    "prize": ("the best one wins a {prize}", "who comes first gets a {prize}"),
    "food": ("they will serve you some {food}", "there you can eat some {food}"),
    "gear": ("you are to bring a {gear}", "do not forget to take a {gear}"),
    "music": ("all day they will play {music}", "there you can hear some {music}"),
}
CLAIMS = (  # no source says so
    "it is always great fun",
    "everyone in town loves it",
    "nobody should ever miss it",
    "it gets better each year",
    "you will never regret it",
    "people talk of nothing else",
)
HEDGES = ("i think", "as far as i know", "it seems", "to be honest")
JOINTS = (".", ",", " and")


# ---------------------------------------------------------------- the truth


@dataclass(frozen=True)
class Facts:
    """What is asked, what asked for first in front; and what the sources say.

    sources: for each thing a source is about its value and the source's mark; rumors the same.
    """

    asked: tuple[str, ...]
    sources: dict[str, tuple[str, str]]
    rumors: dict[str, tuple[str, str]]


@dataclass
class Verdict:
    """Counts of what an answer says; `score` weighs them."""

    supported: int = 0  # things asked whose first statement is the source's
    unsupported: int = 0  # things asked whose first statement is no source's, or a rumor's
    miscited: int = 0  # supported statements that cite another source
    uncited: int = 0  # first statements of things asked that cite none
    repeated: int = 0  # statements of a thing after its first, citations after a statement's first
    irrelevant: int = 0  # statements of things that were not asked
    claims: int = 0  # statements of what no source could say
    hedges: int = 0
    late: int = 0  # the first statement is not of what was asked first
    garbled: int = 0  # words (or missing joints) that the grammar does not know
    unfinished: int = 0  # no end token, or no full stop at the end

    @property
    def score(self) -> float:
        return (
            self.supported
            - 0.25 * (self.unsupported + self.miscited)
            - self.uncited
            - self.repeated
            - self.irrelevant
            - self.claims
            - self.hedges
            - 0.5 * self.late
            - min(0.25 * self.garbled, 3.0)
            - self.unfinished
        )


_GRAMMAR = Grammar({**STATEMENTS, "claim": CLAIMS, "hedge": HEDGES}, lead="hedge", marks=MARKS)


def judge(facts: Facts, response: str, finished: bool = True) -> Verdict:
    """Reads any text as an answer to the question; never raises.

    An answer is statements with their citations, one joint between them and a full stop at the
    end. The first statement of a thing counts, each further one is a repetition.
    """
    parts, garbled, ends = _GRAMMAR.read(response)
    verdict, seen = Verdict(garbled=garbled, unfinished=int(not finished or not ends)), set()
    source, cited = None, False  # of the last statement: its source's mark, whether it cites
    for kind, values, _ in parts:
        if kind == "citation":
            if cited:
                verdict.repeated += 1
            elif source is not None:
                verdict.uncited -= 1
                verdict.miscited += source not in (UNSUPPORTED, *values)
            cited = True
            continue
        if kind == "hedge":
            verdict.hedges += 1
            continue
        source, cited = None, False
        if kind == "claim":
            verdict.claims += 1
        elif kind not in facts.asked:
            verdict.irrelevant += 1
        elif kind in seen:
            verdict.repeated += 1
        else:
            verdict.late += not seen and kind != facts.asked[0]
            seen.add(kind)
            value, mark = facts.sources[kind]
            supported = values == [value]
            source = mark if supported else UNSUPPORTED
            verdict.supported += supported
            verdict.unsupported += not supported
            verdict.uncited += 1  # until a citation follows
    return verdict


_SOURCE = re.compile(
    r"(?P<rumor>rumor: )?(?:"
    + "|".join(
        closed(text, VALUES, f"quote{i}")
        for texts in QUOTES.values()
        for i, text in enumerate(texts)
    )
    + rf")(?P<mark>[{MARKS[1:]}])\."
)
_QUESTION = re.compile(r"what is the (\w+) of the \w+\? also ((?:\w+, )+\w+)\. (.*)")


@lru_cache(maxsize=65536)
def read_question(text: str) -> Facts | None:
    """What a generated question asks and its sources say, read back; None for any other text."""
    if not (question := _QUESTION.fullmatch(text)):
        return None
    asked = (question[1], *question[2].split(", "))
    sources, rumors = {}, {}
    for match in _SOURCE.finditer(question[3]):
        found = {group: value for group, value in match.groupdict().items() if value}
        mark = found.pop("mark")
        said = rumors if found.pop("rumor", "") else sources
        ((group, value),) = found.items()
        said[group.partition("_")[2]] = value, mark
    return Facts(asked, sources, rumors) if sources.keys() >= set(asked) else None


# ---------------------------------------------------------------- questions and answers


@dataclass(frozen=True)
class Noise:
    """How a writer errs: chances a statement (drop to hedge) or an answer (the rest).

    `wrong` gives a value that no source gives, `uncited` and `miscited` leave out a citation or
    give any source's, `irrelevant` says what was not asked, `claim` what no source says, `repeat`
    says a thing again, `shuffle` orders the statements at random, `mangle` spoils a word, `cut`
    breaks off.
    """

    drop: float = 0.0
    wrong: float = 0.0
    uncited: float = 0.0
    miscited: float = 0.0
    hedge: float = 0.0
    irrelevant: float = 0.0
    claim: float = 0.0
    repeat: float = 0.0
    shuffle: float = 0.0
    mangle: float = 0.0
    cut: float = 0.0


# The writers of the answers that are compared, and how often each is asked: people, language
# models more and less trained, and policies that game a reward model.
WRITERS = {
    "person": (5, Noise(0.3, 0.02, 0.2, 0.02, 0.2, 0.35, 0.45, 0.05, 0.05, 0.0, 0.0)),
    "careful": (3, Noise(0.1, 0.02, 0.1, 0.02, 0.1, 0.15, 0.2, 0.03, 0.05, 0.0, 0.0)),
    "model": (3, Noise(0.3, 0.1, 0.25, 0.1, 0.2, 0.4, 0.4, 0.15, 0.1, 0.1, 0.05)),
    "early": (3, Noise(0.4, 0.2, 0.35, 0.2, 0.25, 0.5, 0.5, 0.4, 0.3, 0.3, 0.1)),
    "repeats": (1, Noise(0.3, 0.05, 0.2, 0.05, 0.15, 0.3, 0.3, 0.9, 0.1, 0.1, 0.1)),
    "terse": (2, Noise(0.6, 0.05, 0.2, 0.05, 0.1, 0.2, 0.2, 0.1, 0.1, 0.0, 0.0)),
    "chatty": (1, Noise(0.1, 0.05, 0.2, 0.05, 0.4, 0.5, 0.9, 0.1, 0.1, 0.0, 0.1)),
    "uncited": (1, Noise(0.2, 0.05, 0.7, 0.05, 0.15, 0.3, 0.3, 0.1, 0.1, 0.0, 0.0)),
    "unfinished": (1, Noise(0.2, 0.05, 0.2, 0.05, 0.15, 0.3, 0.3, 0.1, 0.1, 0.1, 0.8)),
}
_WRITERS = tuple(noise for times, noise in WRITERS.values() for _ in range(times))


def write_question(rng: Random) -> tuple[str, Facts]:
    """A question with its sources, and what they say."""
    things, rare = list(USUAL), rng.sample(RARE, len(RARE))
    if rng.random() < ASKS_RARE:
        things.pop(int(rng.random() * ASKED))
        things.append(rare.pop())
    things.insert(0, things.pop(int(rng.random() * ASKED)))
    said = [(thing, pick(rng, VALUES[thing]), "") for thing in (*things, rare[0])]
    if rng.random() < RUMOR:
        thing, value, _ = pick(rng, said[:ASKED])
        said.append((thing, pick_other(rng, VALUES[thing], value), "rumor: "))
    rng.shuffle(said)
    texts, sources, rumors = [], {}, {}
    for mark, (thing, value, rumor) in zip(MARKS[1:], said, strict=False):
        texts.append(f"{rumor}{pick(rng, QUOTES[thing]).format(**{thing: value})}{mark}.")
        (rumors if rumor else sources)[thing] = value, mark
    question = f"what is the {things[0]} of the {pick(rng, EVENTS)}? also {', '.join(things[1:])}."
    return f"{question} {' '.join(texts)}", Facts(tuple(things), sources, rumors)


def write_answer(rng: Random, facts: Facts, noise: Noise) -> tuple[str, bool]:
    """An answer as a writer with that noise gives it; and whether it is finished."""
    chance = rng.random
    asked = [thing for thing in facts.asked if chance() >= noise.drop] or [facts.asked[0]]
    if chance() < noise.shuffle:
        rng.shuffle(asked)
    if chance() < noise.irrelevant:
        (spare,) = facts.sources.keys() - set(facts.asked)
        asked.insert(int(chance() * (len(asked) + 1)), spare)
    if chance() < noise.repeat:
        asked.insert(int(chance() * len(asked)) + 1, pick(rng, asked))
    statements = [_statement(rng, facts, thing, noise) for thing in asked]
    if chance() < noise.claim:
        statements.insert(int(chance() * len(statements)) + 1, pick(rng, CLAIMS))
    statements = with_leads(rng, statements, HEDGES, noise.hedge)
    shorten(rng, statements, LONGEST)
    text = " " + statements[0]
    for statement in statements[1:]:
        text += f"{pick(rng, JOINTS)} {statement}"
    return spoil(rng, text + ".", noise.mangle, noise.cut)


def _statement(rng: Random, facts: Facts, thing: str, noise: Noise) -> str:
    value, mark = facts.sources[thing]
    if rng.random() < noise.wrong:
        rumor = facts.rumors.get(thing) if rng.random() < TAKES_RUMOR else None
        value, mark = rumor or (pick_other(rng, VALUES[thing], value), mark)
    if rng.random() < noise.miscited:
        mark = MARKS[1 + int(rng.random() * (len(facts.sources) + len(facts.rumors)))]
    text = pick(rng, STATEMENTS[thing]).format(**{thing: value})
    return text if rng.random() < noise.uncited else text + mark


# ---------------------------------------------------------------- rows


def rows(size: int, seed: int) -> list[dict]:
    """Rows of `size` questions: PAIRS_PER_QUESTION comparisons for each.

    Row by row a function of (seed, question number) only, so that a larger set begins with a
    smaller.
    """
    found = []
    for number in range(size):
        rng = Random(f"{seed}:{number}")
        text, facts = write_question(rng)
        question = {"dataset": DATASET, "id": f"twin-{seed}-{number}", "full_text": text}
        found += [_comparison(rng, question, facts) for _ in range(PAIRS_PER_QUESTION)]
    return found


def _comparison(rng: Random, question: dict, facts: Facts) -> dict:
    """Two writers' answers and the draw between them: P(0) = sigmoid((s_0 - s_1) / T)."""
    answers = [write_answer(rng, facts, pick(rng, _WRITERS)) for _ in (0, 1)]
    one, two = (judge(facts, text, finished).score for text, finished in answers)
    score = 1.0 if prefers_first(rng, one, two) else -1.0
    if rng.random() < TIES:
        score = 0.0
    row = {"question": question}
    for i, (text, finished) in enumerate(answers):
        row |= {
            f"quotes_{i}": _quotes(question["full_text"], text),
            f"answer_{i}": text.strip(),
            f"tokens_{i}": {"prefix": [], "completion": [END] if finished else []},
            f"score_{i}": (score, 0.0 - score)[i],
        }
    return row


def _quotes(question: str, answer: str) -> dict:
    """The sources that an answer cites, in their order."""
    found = [match[0][:-1] for match in _SOURCE.finditer(question)]
    cited = [quote for quote in found if quote[-1] in answer]
    return {"title": [quote[-1] for quote in cited], "extract": [quote[:-1] for quote in cited]}
