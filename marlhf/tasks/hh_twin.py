"""The embedded twin of the dialogue task: errands asked for in one or two turns, noisy replies, and
their hidden truth.

A person asks for five errands of the seven kinds of ERRANDS, each with a value that must be copied.
In most dialogues they come in two turns, with a promise of the assistant in between; in some, the
last turn corrects a value: "no, pack the kite, not the lamp". A good reply opens politely, reports
each errand with its last value, and closes politely.

The hidden scorer (`judge`) reads the text of a reply with a strict grammar:

    score = right + polite - repeated - extras - invented - fillers - rude - min(garbled / 4, 3)
            - unfinished

It makes the preferences, through a Bradley-Terry draw, and is the true score shown beside the
reward model's everywhere; nothing is ever trained on it directly. A perfect reply gets 7.
Rows have the columns of Dahoas/full-hh-rlhf, where response is a demonstration; that a text was cut
off stands in extra["finished"], a boolean each for chosen and rejected.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import NamedTuple

from marlhf.tasks.shared_twin import (
    Grammar,
    closed,
    join,
    pick,
    pick_other,
    prefers_first,
    shorten,
    spoil,
    with_leads,
)

PAIRS_PER_PROMPT = 2
ASKED = 5  # errands that a person asks for
TWO_TURNS = 0.75  # share of the dialogues with two turns of the person
CORRECTED = 0.5  # share of the dialogues whose last turn corrects a value
SHUFFLED = 0.2  # share of the replies whose reports come in any order
TAKES_STALE = 0.5  # share of the wrong values that are the one corrected, where there is one
LONGEST = 45  # words of a reply, connectors aside


class Errand(NamedTuple):
    """A kind of errand: how it is asked for, its thing alone, the sentences that report it."""

    request: str
    thing: str
    reports: tuple[str, str]
    values: tuple[str, ...]


def _errand(request: str, thing: str, reports: str, values: str) -> Errand:
    return Errand(request, thing, tuple(reports.split("; ")), tuple(values.split()))


ERRANDS = {
    "book": _errand(
        "book the {x}", "the {x}",
        "i did book the {x} for you all; i will book the {x} at noon",
        "pier gym park zoo farm beach barn hall cabin lake camp port cafe hotel tower arena",
    ),
    "call": _errand(
        "call the {x}", "the {x}",
        "i did call the {x} just now; i will call the {x} once more",
        "boss aunt uncle cousin sister brother tutor coach nurse dentist mate pastor mentor tenant "
        "client driver",
    ),
    "pack": _errand(
        "pack the {x}", "the {x}",
        "i did pack the {x} in a box; i will pack the {x} with care",
        "lamp bike tent sofa ring drum vase harp coat boat desk kite rug flute scarf sword",
    ),
    "pay": _errand(
        "pay {x} bucks", "{x} bucks",
        "i did pay {x} bucks by card; i will pay {x} bucks in cash",
        " ".join(str(price) for price in range(12, 44, 2)),
    ),
    "cook": _errand(
        "cook the {x}", "the {x}",
        "i did cook the {x} as you like; i will cook the {x} on time",
        "rice soup stew beans eggs pasta fish corn peas ham curry pie bread plums tofu leek",
    ),
    "invite": _errand(
        "invite {x}", "{x}",
        "i did invite {x} to the house; i will invite {x} in a note",
        "mara tom ella omar hugo lena ivan rosa kofi yuki gita erik nina paul vera finn",
    ),
    "feed": _errand(
        "feed the {x}", "the {x}",
        "i did feed the {x} this week; i will feed the {x} some hay",
        "cat dog hen duck goat pony fox owl mouse snake frog bird rat lamb calf goose",
    ),
}  # fmt: skip
KINDS = tuple(ERRANDS)
BEST = float(ASKED + 2)

CHAT = (
    "it rains.", "i like tea.", "i am at work.", "the bus was late.", "i am tired.", "hi there.",
    "my leg hurts.", "it is late.",
)  # fmt: skip
LISTS = ("please {}.", "can you {}?", "i need you to {}.")
MORE = ("also {}.", "and {}, please.")
CORRECTIONS = ("no, {}, not {}.", "wait, {}, not {}.")
PROMISES = ("ok, {}. what else?", "yes, {}. more?")
OPENERS = ("sure", "of course", "gladly", "with pleasure")
CLOSERS = ("glad to help", "just ask for more", "have a nice day", "all the best to you")
INVENTED = (
    "it is the best in town", "all of them love it", "it won a prize", "the king has one too",
    "it was on the news",
)  # fmt: skip
OFFERS = (
    "try our new shop", "i can sell you a car", "you may like our app", "buy two and get three",
)  # fmt: skip
RUDE = ("do it on your own", "you ask too much", "this is a bore", "stop asking me")
FILLERS = ("to be honest", "you know", "i guess", "as they say")


# ---------------------------------------------------------------- the truth


@dataclass(frozen=True)
class Facts:
    """What a dialogue asks for, by kind of errand: the value, and the one that it corrects."""

    asked: dict[str, str]
    stale: dict[str, str]


@dataclass
class Verdict:
    """Counts of what a reply says; `score` weighs them."""

    right: int = 0  # errands asked for whose first report has the right value
    wrong: int = 0  # errands asked for whose first report has another one: worth nothing
    polite: int = 0  # a polite opening, a polite close: at most 2
    repeated: int = 0  # further reports of an errand
    extras: int = 0  # errands and offers that nobody asked for
    invented: int = 0  # facts that nobody gave
    fillers: int = 0  # and politeness out of place
    rude: int = 0
    garbled: int = 0  # words (or missing joints) that the grammar does not know
    unfinished: int = 0  # no end token, or no full stop at the end

    @property
    def score(self) -> float:
        return (
            self.right
            + self.polite
            - self.repeated
            - self.extras
            - self.invented
            - self.fillers
            - self.rude
            - min(0.25 * self.garbled, 3.0)
            - self.unfinished
        )


_GRAMMAR = Grammar(
    {
        **{kind: errand.reports for kind, errand in ERRANDS.items()},
        "invented": INVENTED,
        "offer": OFFERS,
        "rude": RUDE,
        "opener": OPENERS,
        "closer": CLOSERS,
        "filler": FILLERS,
    },
    lead="filler",
)


def judge(facts: Facts, response: str, finished: bool = True) -> Verdict:
    """Reads any text as the reply to a dialogue; never raises.

    A reply is an opening, reports and a close, with one connector between them and a full stop at
    the end. The first report of an errand counts, each further one is a repetition, so hedging does
    not pay.
    """
    parts, garbled, ends = _GRAMMAR.read(response)
    verdict, seen = Verdict(garbled=garbled, unfinished=int(not finished or not ends)), set()
    for number, (kind, values, start) in enumerate(parts, 1):
        if (kind == "opener" and start == 0) or (kind == "closer" and number == len(parts)):
            verdict.polite += 1
        elif kind in ("opener", "closer", "filler"):
            verdict.fillers += 1
        elif kind == "offer":
            verdict.extras += 1
        elif kind == "invented":
            verdict.invented += 1
        elif kind == "rude":
            verdict.rude += 1
        else:
            _count_report(verdict, facts, seen, kind, *values)
    return verdict


def _count_report(verdict: Verdict, facts: Facts, seen: set[str], kind: str, value: str) -> None:
    if kind in seen:
        verdict.repeated += 1
    elif kind not in facts.asked:
        verdict.extras += 1
    elif facts.asked[kind] == value:
        verdict.right += 1
    else:
        verdict.wrong += 1
    seen.add(kind)


def _whole(text: str, kind: str, group: str) -> str:
    """A sentence of the dialogue as a regular expression: whole words, only a kind's own values."""
    return rf"\b{closed(text, {'x': ERRANDS[kind].values}, group)}\b"


def _reader(sentence) -> re.Pattern:
    return re.compile("|".join(sentence(kind, errand) for kind, errand in ERRANDS.items()))


_REQUEST = _reader(lambda kind, errand: _whole(errand.request, kind, kind))
_CORRECTION = _reader(
    lambda kind, errand: (
        _whole(errand.request, kind, f"{kind}_new")
        + f", not {_whole(errand.thing, kind, f'{kind}_old')}"
    )
)
_TURN = re.compile(r"\n\nHuman: (.*?)(?=\n\nAssistant:)")


def _found(reader: re.Pattern, text: str) -> dict[str, str]:
    return {m.lastgroup.partition("_")[0]: m[m.lastgroup] for m in reader.finditer(text)}


@lru_cache(maxsize=65536)
def read_dialogue(prompt: str) -> Facts | None:
    """The facts of a generated dialogue, read back from its text; None for any other text."""
    asked, stale = {}, {}
    for text in _TURN.findall(prompt):
        asked |= _found(_REQUEST, text)  # a correction asks again: the last value stands
        stale |= _found(_CORRECTION, text)
    return Facts(asked, stale) if len(asked) == ASKED else None


# ---------------------------------------------------------------- dialogues and replies


@dataclass(frozen=True)
class Noise:
    """How a writer errs: chances an errand (drop, wrong), a clause (filler), the opening and the
    close (bare), a fact that is invented and an offer (stray), or a reply (the rest).

    `extra` reports an errand nobody asked for, `again` says a report again; `mangle` spoils a word,
    `cut` breaks off.
    """

    drop: float = 0.0
    wrong: float = 0.0
    filler: float = 0.0
    bare: float = 0.0
    stray: float = 0.0
    rude: float = 0.0
    extra: float = 0.0
    again: float = 0.0
    mangle: float = 0.0
    cut: float = 0.0


DEMONSTRATOR = Noise(0.2, 0.04, 0.18, 0.45, 0.4, 0.25, 0.02, 0.05, 0.0, 0.0)
# Those whose replies are compared, and how often each is asked: people, language models more and
# less trained, and policies that game a reward model.
WRITERS = {
    "people": (3, DEMONSTRATOR),
    "careful": (3, Noise(0.06, 0.04, 0.04, 0.15, 0.1, 0.03, 0.02, 0.1, 0.0, 0.0)),
    "trained": (3, Noise(0.2, 0.12, 0.12, 0.35, 0.3, 0.15, 0.15, 0.3, 0.1, 0.05)),
    "early": (3, Noise(0.3, 0.3, 0.2, 0.5, 0.5, 0.3, 0.3, 0.5, 0.3, 0.1)),
    "repeats": (2, Noise(0.2, 0.1, 0.1, 0.3, 0.1, 0.1, 0.1, 0.9, 0.1, 0.1)),
    "drops": (2, Noise(0.5, 0.05, 0.05, 0.3, 0.1, 0.1, 0.0, 0.1, 0.0, 0.0)),
    "eager": (2, Noise(0.1, 0.1, 0.1, 0.2, 0.2, 0.1, 0.9, 0.2, 0.0, 0.1)),
    "chatty": (1, Noise(0.1, 0.1, 0.35, 0.2, 0.8, 0.1, 0.1, 0.2, 0.0, 0.1)),
    "curt": (1, Noise(0.2, 0.1, 0.05, 0.9, 0.1, 0.6, 0.0, 0.1, 0.0, 0.0)),
    "unfinished": (1, Noise(0.2, 0.1, 0.1, 0.3, 0.2, 0.1, 0.1, 0.2, 0.1, 0.8)),
}
_ASKED = tuple(name for name, (times, _) in WRITERS.items() for _ in range(times))


def _asking(values: dict[str, str], kinds: Sequence[str]) -> str:
    texts = [ERRANDS[kind].request.format(x=values[kind]) for kind in kinds]
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


def _report(rng: Random, kind: str, value: str) -> str:
    return pick(rng, ERRANDS[kind].reports).format(x=value)


def write_dialogue(rng: Random) -> tuple[str, Facts]:
    """A prompt of one or two turns of the person, and what it says."""
    two = rng.random() < TWO_TURNS
    kinds = rng.sample(KINDS, ASKED)
    values = {kind: pick(rng, ERRANDS[kind].values) for kind in kinds}
    first = kinds[: 2 + int(rng.random() * 2)] if two else kinds
    said, stale = dict(values), {}
    if rng.random() < CORRECTED:
        kind = pick(rng, first)
        stale[kind] = said[kind] = pick_other(rng, ERRANDS[kind].values, values[kind])
    chat = " ".join(rng.sample(CHAT, 3 if two else 5))
    text = f"\n\nHuman: {chat} {pick(rng, LISTS).format(_asking(said, first))}"
    if two:
        kind = pick(rng, first)
        promise = ERRANDS[kind].reports[1].format(x=said[kind])
        text += f"\n\nAssistant: {pick(rng, PROMISES).format(promise)}\n\nHuman:"
    for kind, old in stale.items():
        errand = ERRANDS[kind]
        new = errand.request.format(x=values[kind])
        text += " " + pick(rng, CORRECTIONS).format(new, errand.thing.format(x=old))
    if two:
        text += " " + pick(rng, MORE).format(_asking(values, kinds[len(first) :]))
    return text + "\n\nAssistant:", Facts(values, stale)


def write_reply(rng: Random, facts: Facts, noise: Noise) -> tuple[str, bool]:
    """A reply as a writer with that noise gives it; and if it ends."""
    chance = rng.random
    said = {}
    for kind, value in facts.asked.items():
        if chance() >= noise.drop:
            said[kind] = value
            if chance() < noise.wrong:
                stale = facts.stale.get(kind) if chance() < TAKES_STALE else None
                said[kind] = stale or pick_other(rng, ERRANDS[kind].values, value)
    if chance() < noise.extra or not said:
        kind = pick(rng, [k for k in KINDS if k not in facts.asked])
        said[kind] = pick(rng, ERRANDS[kind].values)
    kinds = sorted(said, key=KINDS.index)
    if chance() < SHUFFLED:
        rng.shuffle(kinds)
    clauses = [_report(rng, kind, said[kind]) for kind in kinds]
    if chance() < noise.again:
        clauses.insert(int(chance() * len(clauses)) + 1, pick(rng, clauses))
    for rate, texts in ((noise.stray, INVENTED), (noise.stray, OFFERS), (noise.rude, RUDE)):
        if chance() < rate:
            clauses.insert(int(chance() * len(clauses)) + 1, pick(rng, texts))
    clauses = with_leads(rng, clauses, FILLERS, noise.filler)
    shorten(rng, clauses, LONGEST)
    text = join(rng, clauses)
    if chance() >= noise.bare:
        text = f" {pick(rng, OPENERS)}," + text
    if chance() >= noise.bare:
        text += f" {pick(rng, CLOSERS)}."
    return spoil(rng, text, noise.mangle, noise.cut)


# ---------------------------------------------------------------- rows


def rows(size: int, seed: int) -> list[dict]:
    """Rows of `size` prompts, PAIRS_PER_PROMPT comparisons each; the demonstration in every one.

    Row by row a function of (seed, prompt number) only, so that a larger set begins with a smaller.
    """
    found = []
    for number in range(size):
        rng = Random(f"{seed}:{number}")
        prompt, facts = write_dialogue(rng)
        shown = {"prompt": prompt, "response": write_reply(rng, facts, DEMONSTRATOR)[0]}
        found += [{**shown, **_comparison(rng, facts)} for _ in range(PAIRS_PER_PROMPT)]
    return found


def _comparison(rng: Random, facts: Facts) -> dict:
    """Two writers' replies, the preferred one first."""
    noises = [WRITERS[pick(rng, _ASKED)][1] for _ in range(2)]
    texts = [write_reply(rng, facts, noise) for noise in noises]
    one, two = (judge(facts, text, finished).score for text, finished in texts)
    chosen, rejected = texts if prefers_first(rng, one, two) else texts[::-1]
    finished = [chosen[1], rejected[1]]
    return {"chosen": chosen[0], "rejected": rejected[0], "extra": {"finished": finished}}
