"""The embedded twin of the TL;DR task: generated posts, noisy summaries, and their hidden truth.

A post has nine short sentences in any order: six that carry the seven slots of SLOTS, and three
that do not matter: distractors, and in some posts a decoy (another person with an item, a month, a
price ... of their own). A summary is a row of clauses in one or two sentences. Every value must be
copied from the post; all of them are drawn evenly from lists.

The hidden scorer (`judge`) reads the text of a summary with a strict grammar:

    score = right - wrong / 4 - repeated - distractors - fillers - min(garbled / 4, 3) - unfinished

It makes the preferences, through a Bradley-Terry draw, and is the true score shown beside the
reward model's everywhere; nothing is ever trained on it directly. A perfect summary gets 7.
Rows have the columns of openai/summarize_from_feedback (`comparisons`) and of posts with
summaries; that a text was cut off stands in extra["finished"], one boolean a summary.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from random import Random

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

PAIRS_PER_POST = 2
TAKES_DECOY = 0.4  # share of the wrong values that are the decoy's, where it has one
DECOY = 0.3  # share of the posts with a decoy
LONGEST = 45  # words of a summary, connectors aside

VALUES = {
    "kin": "boss aunt uncle cousin sister friend tutor coach nurse dentist mate pastor mentor "
    "tenant client driver",
    "name": "mara tom ella omar hugo lena ivan rosa kofi yuki gita erik nina paul vera finn ruth "
    "igor maya sven",
    "item": "lamp bike tent sofa ring drum vase harp coat boat desk kite rug oven flute scarf "
    "phone clock sword chair",
    "place": "pier gym park zoo farm beach barn bank mall dock lake camp port cafe depot hotel "
    "tower arena plaza club",
    "month": "january february march april may june july august september october november "
    "december spring summer autumn winter",
    "price": " ".join(str(price) for price in range(12, 52, 2)),
    "plan": "sue move quit leave wait talk shout cry hide run argue write settle confess travel "
    "sleep",
}
VALUES = {slot: words.split() for slot, words in VALUES.items()}
SLOTS = tuple(VALUES)
BEST = float(len(SLOTS))

# A sentence of the post for each clause of the summary, in two wordings.
SENTENCES = {
    "who": ("my {kin} {name} rang.", "my {kin} {name} came."),
    "item": ("took my {item}.", "my {item} is gone."),
    "place": ("met at the {place}.", "was at the {place}."),
    "month": ("it was {month}.", "met in {month}."),
    "price": ("it cost {price}.", "paid {price}."),
    "plan": ("i will {plan}.", "may {plan}."),
}
DECOYS = (
    "{name} lost the {item}.",
    "{name} got {price}.",
    "{name} left the {place} in {month}.",
    "one {kin} will {plan}.",
)
DISTRACTORS = {  # in the post: in a summary
    "it rains.": "it rains a lot",
    "i like tea.": "op likes tea",
    "i have a cat.": "op has a cat",
    "the bus was late.": "the bus was late",
    "i am tired.": "op is tired",
    "the sky is grey.": "the sky is grey",
    "i had soup.": "op had soup",
    "my leg hurts.": "op has a bad leg",
}
CLAUSES = {
    "who": ("this is all about the {kin} {name}", "op has trouble with the {kin} {name}"),
    "item": ("they took the {item} that op had", "the {item} of op has been taken"),
    "place": ("the two of them met at the {place}", "all of this was at the {place}"),
    "month": ("it all took place in {month}", "this was some time in {month}"),
    "price": ("the whole thing cost {price} bucks", "op lost a sum of {price} bucks"),
    "plan": ("right now op only wants to {plan}", "in the end op might just {plan}"),
}
SLOTS_OF = {clause: re.findall(r"{(\w+)}", text[0]) for clause, text in CLAUSES.items()}
FILLERS = ("to be fair", "you know", "i guess", "as i said")
SUBREDDITS = ("advice", "work", "home", "legal", "rant", "money")
TITLES = ("help", "update", "rant", "question", "sad")


# ---------------------------------------------------------------- the truth


@dataclass(frozen=True)
class Facts:
    """What a post says: the value of each slot, the decoys' values, and its distractors."""

    values: dict[str, str]
    decoys: dict[str, str]
    distractors: tuple[str, ...]


@dataclass
class Verdict:
    """Counts of what a summary says; `score` weighs them."""

    right: int = 0  # slots whose first statement is the post's value
    wrong: int = 0  # slots whose first statement is another one
    repeated: int = 0  # statements of a slot after its first
    distractors: int = 0  # clauses about what does not matter
    fillers: int = 0
    garbled: int = 0  # words (or missing joints) that the grammar does not know
    unfinished: int = 0  # no end token, or no full stop at the end

    @property
    def score(self) -> float:
        return (
            self.right
            - 0.25 * self.wrong
            - self.repeated
            - self.distractors
            - self.fillers
            - min(0.25 * self.garbled, 3.0)
            - self.unfinished
        )


_GRAMMAR = Grammar(
    {
        **CLAUSES,
        "decoy": ("{name} lost the {item}",),
        "distractor": tuple(DISTRACTORS.values()),
        "filler": FILLERS,
    },
    lead="filler",
)


def judge(facts: Facts, response: str, finished: bool = True) -> Verdict:
    """Reads any text as a summary of the post; never raises.

    A summary is clauses with one connector between them and a full stop at the end. The first
    statement of a slot counts, each further one is a repetition, so hedging does not pay.
    """
    parts, garbled, ends = _GRAMMAR.read(response)
    verdict, seen = Verdict(garbled=garbled, unfinished=int(not finished or not ends)), set()
    for kind, values, _ in parts:
        if kind == "filler":
            verdict.fillers += 1
        elif kind in ("decoy", "distractor"):
            verdict.distractors += 1
        else:
            for slot, value in zip(SLOTS_OF[kind], values, strict=True):
                if slot in seen:
                    verdict.repeated += 1
                elif facts.values[slot] == value:
                    verdict.right += 1
                else:
                    verdict.wrong += 1
                seen.add(slot)
    return verdict


_SENTENCE = re.compile(
    "|".join(
        [
            *(
                closed(text, VALUES, f"{clause}{i}")
                for clause, texts in SENTENCES.items()
                for i, text in enumerate(texts)
            ),
            *(closed(text, VALUES, f"decoy{i}") for i, text in enumerate(DECOYS)),
            f"(?P<distractor_>{'|'.join(re.escape(text) for text in DISTRACTORS)})",
        ]
    )
)


@lru_cache(maxsize=65536)
def read_post(post: str) -> Facts | None:
    """The facts of a generated post, read back from its text; None for any other text."""
    values, decoys, distractors = {}, {}, []
    for match in _SENTENCE.finditer(post):
        for group, text in match.groupdict().items():
            if text is None:
                continue
            clause, _, slot = group.partition("_")
            if clause == "distractor":
                distractors.append(text)
            else:
                (decoys if clause.startswith("decoy") else values)[slot] = text
    return Facts(values, decoys, tuple(distractors)) if len(values) == len(SLOTS) else None


# ---------------------------------------------------------------- posts and summaries


@dataclass(frozen=True)
class Noise:
    """How a writer errs: chances a clause (drop, filler), a slot (wrong) or a summary (the rest).

    `repeat` says a clause again, `swap` exchanges the values of two slots, `mangle` spoils a
    word, `cut` breaks off, `shuffle` orders the clauses at random.
    """

    drop: float = 0.0
    wrong: float = 0.0
    filler: float = 0.0
    distractor: float = 0.0
    repeat: float = 0.0
    swap: float = 0.0
    mangle: float = 0.0
    cut: float = 0.0
    shuffle: float = 0.0


DEMONSTRATOR = Noise(0.25, 0.06, 0.2, 0.6, 0.2, 0.02, 0.0, 0.0, 0.2)
# The writers of the summaries that are compared, and how often each is asked: people, language
# models more and less trained, and policies that game a reward model.
WRITERS = {
    "ref": (3, DEMONSTRATOR),
    "careful": (3, Noise(0.08, 0.05, 0.05, 0.2, 0.1, 0.0, 0.0, 0.0, 0.2)),
    "sup": (3, Noise(0.2, 0.15, 0.15, 0.5, 0.3, 0.1, 0.1, 0.05, 0.3)),
    "sup_early": (3, Noise(0.3, 0.3, 0.25, 0.7, 0.5, 0.2, 0.3, 0.1, 0.3)),
    "repeats": (1, Noise(0.2, 0.1, 0.1, 0.3, 0.9, 0.0, 0.1, 0.1, 0.3)),
    "drops": (2, Noise(0.5, 0.05, 0.05, 0.2, 0.1, 0.0, 0.0, 0.0, 0.2)),
    "chatty": (1, Noise(0.1, 0.1, 0.4, 0.9, 0.2, 0.0, 0.0, 0.1, 0.2)),
    "unfinished": (1, Noise(0.2, 0.1, 0.1, 0.3, 0.2, 0.0, 0.1, 0.8, 0.2)),
}
_ASKED = tuple(name for name, (times, _) in WRITERS.items() for _ in range(times))


def write_post(rng: Random) -> tuple[str, Facts]:
    """Nine sentences in any order, and what they say."""
    values = {slot: pick(rng, choices) for slot, choices in VALUES.items()}
    sentences = [pick(rng, texts).format(**values) for texts in SENTENCES.values()]
    decoys, distractors = {}, rng.sample(tuple(DISTRACTORS), 3)
    if rng.random() < DECOY:
        template = pick(rng, DECOYS)
        slots = re.findall(r"{(\w+)}", template)
        decoys = {slot: pick_other(rng, VALUES[slot], values[slot]) for slot in slots}
        sentences.append(template.format(**decoys))
        distractors.pop()
    sentences += distractors
    rng.shuffle(sentences)
    return " ".join(sentences), Facts(values, decoys, tuple(distractors))


def write_summary(rng: Random, facts: Facts, noise: Noise) -> tuple[str, bool]:
    """A summary of one or two sentences as a writer with that noise gives it; and if it ends."""
    chance = rng.random
    said = dict(facts.values)
    for slot in SLOTS:
        if chance() < noise.wrong:
            decoy = facts.decoys.get(slot) if chance() < TAKES_DECOY else None
            said[slot] = decoy or pick_other(rng, VALUES[slot], said[slot])
    if chance() < noise.swap:
        one, two = rng.sample(SLOTS, 2)
        said[one], said[two] = said[two], said[one]
    clauses = [
        pick(rng, texts).format(**said) for texts in CLAUSES.values() if chance() >= noise.drop
    ] or [CLAUSES["who"][0].format(**said)]
    if chance() < noise.shuffle:
        rng.shuffle(clauses)
    if chance() < noise.repeat:
        clauses.insert(int(chance() * len(clauses)) + 1, pick(rng, clauses))
    if chance() < noise.distractor:
        text = DISTRACTORS[pick(rng, facts.distractors)]
        clauses.insert(int(chance() * len(clauses)) + 1, text)
    clauses = with_leads(rng, clauses, FILLERS, noise.filler)
    shorten(rng, clauses, LONGEST)
    return spoil(rng, join(rng, clauses), noise.mangle, noise.cut)


# ---------------------------------------------------------------- rows


def rows(size: int, seed: int) -> list[dict]:
    """Rows of `size` posts: for each a post with its summary, and PAIRS_PER_POST comparisons.

    Row by row a function of (seed, post number) only, so that a larger set begins with a smaller.
    """
    found = []
    for number in range(size):
        found += _post(Random(f"{seed}:{number}"), f"twin-{seed}-{number}")
    return found


def _post(rng: Random, name: str) -> list[dict]:
    post, facts = write_post(rng)
    shown = {"subreddit": pick(rng, SUBREDDITS), "title": pick(rng, TITLES), "post": post}
    summary, _ = write_summary(rng, facts, DEMONSTRATOR)
    info = {"id": name, **shown, "site": None, "article": None}
    return [
        {"id": name, **shown, "summary": summary},
        *(_comparison(rng, info, facts) for _ in range(PAIRS_PER_POST)),
    ]


def _comparison(rng: Random, info: dict, facts: Facts) -> dict:
    """Two writers' summaries and the draw between them: P(0) = sigmoid((s_0 - s_1) / T)."""
    writers = (pick(rng, _ASKED), pick(rng, _ASKED))
    texts = [write_summary(rng, facts, WRITERS[writer][1]) for writer in writers]
    one, two = (judge(facts, text, finished).score for text, finished in texts)
    return {
        "info": info,
        "summaries": [
            {"text": text, "policy": writer, "note": None}
            for (text, _), writer in zip(texts, writers, strict=True)
        ],
        "choice": 0 if prefers_first(rng, one, two) else 1,
        "worker": "twin",
        "batch": "twin",
        "split": "train",
        "extra": {"confidence": None, "finished": [finished for _, finished in texts]},
    }
