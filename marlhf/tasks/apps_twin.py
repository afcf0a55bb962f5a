"""The embedded twin of the program-synthesis task: small problems, tests, noisy solutions.

A problem takes numbers (one a line after their count, all on one line, or as a function's list),
keeps those that fit its conditions, changes each, gathers them and changes the result. Its level is
how much of that it asks for. `Problem` says what is asked; `describe` words it, `write` is the
program that does it, `answer` what it must give. A demonstration is the program of a problem that
was misread (NOISE), sometimes with a slip of the pen, so that there is something for RL to gain.

The truth is the tests: TESTS inputs a problem, rich in the values at which conditions turn, whose
answers all differ (no constant passes two of them) and none of which repeats its input.
Rows have the columns of codeparrot/apps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from random import Random

from marlhf.tasks.shared_twin import pick

LEVELS = ("introductory", "interview", "competition")
FORMS = ("lines", "row", "call")
TESTS, TRIES = 3, 12
LARGEST = 40  # numbers of an input are drawn from 0 to this
START = {"smallest": 999}  # what the answer begins with, 0 otherwise

# kind: (two wordings, program, rule); K is the number, R the rest
CONDITIONS = {
    "above": ("above K", "more than K", "x > K", lambda x, k, r: x > k),
    "least": ("at least K", "K or more", "x >= K", lambda x, k, r: x >= k),
    "below": ("below K", "less than K", "x < K", lambda x, k, r: x < k),
    "most": ("at most K", "K or less", "x <= K", lambda x, k, r: x <= k),
    "multiple": ("a multiple of K", "divisible by K", "x % K == 0", lambda x, k, r: x % k == 0),
    "part": ("no multiple of K", "not divisible by K", "x % K != 0", lambda x, k, r: x % k != 0),
    "rest": ("R over a multiple of K", "R modulo K", "x % K == R", lambda x, k, r: x % k == r),
    "odd": ("odd", "an odd number", "x % 2 == 1", lambda x, k, r: x % 2 == 1),
    "even": ("even", "an even number", "x % 2 == 0", lambda x, k, r: x % 2 == 0),
    "not": ("not K", "other than K", "x != K", lambda x, k, r: x != k),
}
TERMS = {
    "itself": ("take it", "use it as it is", "x", lambda x, k: x),
    "square": ("take its square", "square it", "x * x", lambda x, k: x * x),
    "times": ("take K times it", "multiply it by K", "x * K", lambda x, k: x * k),
    "plus": ("take it plus K", "add K to it", "x + K", lambda x, k: x + k),
    "over": ("take it over K, rounded down", "divide it by K, rounded down", "x // K",
             lambda x, k: x // k),
    "modulo": ("take it modulo K", "reduce it modulo K", "x % K", lambda x, k: x % k),
}  # fmt: skip
GATHERS = {
    "sum": ("the sum", "the total", "s += T", lambda s, t: s + t),
    "count": ("how many there are", "their number", "s += 1", lambda s, t: s + 1),
    "largest": ("the largest", "the greatest", "s = max(s, T)", max),
    "smallest": ("the smallest", "the least", "s = min(s, T)", min),
}
FINALS = {
    "none": ("", "", "", lambda s, k: s),
    "add": (" plus K", " and K more", "s += K", lambda s, k: s + k),
    "take": (" minus K", " less K", "s -= K", lambda s, k: s - k),
    "double": (" times K", " taken K times", "s *= K", lambda s, k: s * k),
    "wrap": (" modulo K", " as a rest of K", "s %= K", lambda s, k: s % k),
}
OTHERS = {
    "none": ("", "", "", lambda s, k: s),
    "lose": ("for the others take away K", "for the rest subtract K", "s -= K",
             lambda s, k: s - k),
    "gain": ("for the others add K", "for the rest count K", "s += K", lambda s, k: s + k),
}  # fmt: skip
SHOWN = {
    "lines": ("Line one is n, then n lines have a number each.", "Read n, then n numbers by line."),
    "row": ("One line has all the numbers.", "Read a line of numbers."),
    "call": ("f gets a list of numbers.", "Write f for a list of numbers."),
}
# what is taken for what by someone who errs
MISREAD = {
    **{"above": "least", "least": "above", "below": "most", "most": "below", "odd": "even"},
    **{"even": "odd", "multiple": "part", "part": "multiple", "rest": "multiple", "not": "above"},
    **{"square": "times", "times": "plus", "plus": "times", "over": "modulo", "modulo": "over"},
    **{"itself": "square", "sum": "count", "count": "sum", "largest": "smallest"},
    **{"smallest": "largest", "add": "take", "take": "add", "double": "add", "wrap": "double"},
    **{"lose": "gain", "gain": "lose"},
}


@dataclass(frozen=True)
class Part:
    """A step of a problem: its kind, with the number and the rest that it may need."""

    kind: str
    k: int = 0
    r: int = 0

    def fill(self, text: str) -> str:
        return text.replace("K", str(self.k)).replace("R", str(self.r))


@dataclass(frozen=True)
class Problem:
    """What is asked for. No condition: all numbers count; `either`: one of two is enough."""

    level: str
    form: str
    conditions: tuple[Part, ...]
    either: bool
    term: Part
    other: Part
    gather: str
    final: Part


# ---------------------------------------------------------------- problems


def _between(rng: Random, low: int, high: int) -> int:
    return low + int(rng.random() * (high - low + 1))


def _condition(rng: Random) -> Part:
    kind = pick(rng, tuple(CONDITIONS))
    if kind in ("multiple", "part", "rest"):
        k = _between(rng, 3, 9)
        return Part(kind, k, _between(rng, 1, k - 1))
    return Part(kind, _between(rng, 8, 32))


def _part(rng: Random, kinds: tuple[str, ...]) -> Part:
    return Part(pick(rng, kinds), _between(rng, 2, 9))


def draw(rng: Random) -> Problem:
    """A problem, its level first."""
    level, form = pick(rng, LEVELS), pick(rng, FORMS)
    terms, finals, nothing = tuple(TERMS), tuple(FINALS)[1:], Part("none")
    if level == "introductory" and rng.random() < 0.5:
        conditions, term, gather = (), _part(rng, terms[1:]), pick(rng, ("sum", "largest"))
    elif level == "introductory":
        conditions, term = (_condition(rng),), Part("itself")
        gather = pick(rng, tuple(GATHERS))
    elif level == "interview":
        conditions, term = (_condition(rng),), _part(rng, terms[1:])
        gather = pick(rng, ("sum", "largest", "smallest"))
    else:
        conditions, term = (_condition(rng), _condition(rng)), _part(rng, terms)
        gather = "sum"
    other = _part(rng, ("none", "lose", "gain")) if level == "competition" else nothing
    either = len(conditions) > 1 and rng.random() < 0.5
    kinds = {c.kind for c in conditions}
    share = sum(fits(conditions, either, x) for x in range(LARGEST + 1)) / (LARGEST + 1)
    if conditions and (len(kinds) < len(conditions) or not 0.1 <= share <= 0.9):
        return draw(rng)  # conditions that are one, or keep nothing or all
    return Problem(level, form, conditions, either, term, other, gather, _part(rng, finals))


def fits(conditions: tuple[Part, ...], either: bool, x: int) -> bool:
    """Whether a number counts."""
    rules = (CONDITIONS[c.kind][3](x, c.k, c.r) for c in conditions)
    return any(rules) if either else all(rules)


def answer(problem: Problem, numbers: list[int]) -> int:
    """What the program must give for these numbers."""
    change, k = TERMS[problem.term.kind][3], problem.term.k
    gather, other = GATHERS[problem.gather][3], OTHERS[problem.other.kind][3]
    s = START.get(problem.gather, 0)
    for x in numbers:
        if fits(problem.conditions, problem.either, x):
            s = gather(s, change(x, k))
        else:
            s = other(s, problem.other.k)
    return FINALS[problem.final.kind][3](s, problem.final.k)


def describe(rng: Random, problem: Problem) -> str:
    """The question in words."""

    def word(table: dict, part: Part) -> str:
        return part.fill(pick(rng, table[part.kind][:2]))

    which = " or " if problem.either else " and "
    rule = which.join(word(CONDITIONS, c) for c in problem.conditions)
    says = f"For each x that is {rule}, " if rule else "For each x, "
    if problem.gather != "count":
        says += word(TERMS, problem.term)
        says += f"; {word(OTHERS, problem.other)}. " if problem.other.kind != "none" else ". "
    else:
        says = f"Look at each x that is {rule}. "
    verb = "Return " if problem.form == "call" else "Print "
    result = pick(rng, GATHERS[problem.gather][:2]) + word(FINALS, problem.final)
    return f"{pick(rng, SHOWN[problem.form])} {says}{verb}{result}."


def write(problem: Problem, slip: str = "") -> str:
    """The program. A slip of the pen: "colon" or "start" is forgotten, "int" is not converted,
    the "last" line stands in the loop."""
    which = " or " if problem.either else " and "
    rule = which.join(c.fill(CONDITIONS[c.kind][2]) for c in problem.conditions)
    term = problem.term.fill(TERMS[problem.term.kind][2])
    step = GATHERS[problem.gather][2].replace("T", term)
    final = problem.final.fill(FINALS[problem.final.kind][2])
    number = "x = input()" if slip == "int" else "x = int(input())"
    heads = {
        "lines": ("n = int(input())", "for i in range(n):", number),
        "row": ("", "for x in input().split():", "" if slip == "int" else "x = int(x)"),
        "call": ("def f(xs):", "for x in xs:", ""),
    }
    first, loop, read = heads[problem.form]
    body = [read] if read else []
    if not rule:
        body.append(step)
    else:
        body += [f"if {rule}" + ":" * (slip != "colon"), f"    {step}"]
        if problem.other.kind != "none":
            body += ["else:", "    " + problem.other.fill(OTHERS[problem.other.kind][2])]
    start = [] if slip == "start" else [f"s = {START.get(problem.gather, 0)}"]
    end = [final] * bool(final) + ["return s" if problem.form == "call" else "print(s)"]
    if slip == "last":
        end[-1] = "    " + end[-1]
    lines = [*start, loop, *("    " + line for line in body), *end]
    inside = "    " if problem.form == "call" else ""
    return "\n".join([first] * bool(first) + [inside + line for line in lines])


# ---------------------------------------------------------------- errors


# Chances that a part is misread, that its number is one off, that it is left out; of a slip.
NOISE = {"kind": 0.13, "number": 0.08, "left out": 0.1, "slip": 0.15}
SLIPS = ("colon", "start", "int", "last")


def _misread(rng: Random, part: Part) -> Part:
    if part.kind in ("none", "itself"):
        return part
    if rng.random() < NOISE["kind"]:
        return replace(part, kind=MISREAD[part.kind])
    if rng.random() < NOISE["number"]:
        return replace(part, k=part.k + pick(rng, (-1, 1)))
    return part


def misread(rng: Random, problem: Problem) -> Problem:
    """The problem as someone who errs understands it."""
    conditions = tuple(_misread(rng, c) for c in problem.conditions)
    if len(conditions) > 1 and rng.random() < NOISE["left out"]:
        conditions = conditions[:1]
    either = problem.either != (rng.random() < NOISE["kind"])
    final, other = _misread(rng, problem.final), _misread(rng, problem.other)
    if rng.random() < NOISE["left out"]:
        final = Part("none")
    if rng.random() < NOISE["left out"]:
        other = Part("none")
    gather = MISREAD[problem.gather] if rng.random() < NOISE["kind"] / 2 else problem.gather
    return replace(
        problem,
        conditions=conditions,
        either=either,
        term=_misread(rng, problem.term),
        other=other,
        gather=gather,
        final=final,
    )


def demonstrate(rng: Random, problem: Problem) -> str:
    """A program as someone who errs writes it."""
    slip = pick(rng, SLIPS) if rng.random() < NOISE["slip"] else ""
    return write(misread(rng, problem), slip)


# ---------------------------------------------------------------- tests and rows


def _numbers(rng: Random, problem: Problem) -> list[int]:
    """Five to seven numbers; half of them at, or one beside, where a condition turns."""
    edges = [
        c.k + step if c.kind not in ("multiple", "part", "rest") else c.k * step + c.r * (step > 0)
        for c in problem.conditions
        for step in (-1, 0, 1, 2)
    ]
    edges = [edge for edge in edges if 0 <= edge <= LARGEST]
    return [
        pick(rng, edges) if edges and rng.random() < 0.5 else _between(rng, 0, LARGEST)
        for _ in range(_between(rng, 5, 7))
    ]


def tests(rng: Random, problem: Problem) -> list[tuple[list[int], int]]:
    """TESTS inputs with their answers, all different, none a number of its input or their count;
    fewer where TRIES inputs have not given so many."""
    found: dict[int, list[int]] = {}
    for _ in range(TRIES):
        numbers = _numbers(rng, problem)
        result = answer(problem, numbers)
        if result not in found and result not in (*numbers, len(numbers), 999):
            found[result] = numbers
            if len(found) == TESTS:
                break
    return [(numbers, result) for result, numbers in found.items()]


def _shown(form: str, numbers: list[int]):
    """The input of a test, as the hub set has it."""
    if form == "call":
        return [numbers]
    if form == "row":
        return " ".join(map(str, numbers)) + "\n"
    return "\n".join(map(str, [len(numbers), *numbers])) + "\n"


def row(seed: int, number: int) -> tuple[dict, Problem]:
    """The row of a problem, and the problem; a function of (seed, number) alone."""
    rng, made = Random(f"{seed}:{number}"), []
    while len(made) < TESTS:
        problem = draw(rng)
        made = tests(rng, problem)
    call = problem.form == "call"
    checks = {
        **({"fn_name": "f"} if call else {}),
        "inputs": [_shown(problem.form, numbers) for numbers, _ in made],
        "outputs": [[result] if call else f"{result}\n" for _, result in made],
    }
    return {
        "problem_id": f"twin-{seed}-{number}",
        "question": describe(rng, problem),
        "solutions": json.dumps([demonstrate(rng, problem)]),
        "input_output": json.dumps(checks),
        "difficulty": problem.level,
        "url": "",
        "starter_code": "def f(xs):" if call else "",
    }, problem


def rows(size: int, seed: int) -> list[dict]:
    """The first `size` problems; a larger set begins with a smaller one."""
    return [row(seed, number)[0] for number in range(size)]
