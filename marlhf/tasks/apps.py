"""Program synthesis (Sec. 4.1, App. B.5): problems with tests; what is sampled is a program.

Rows have the columns of codeparrot/apps; input_output and solutions are JSON in text. A problem
either reads standard input, or names a function (fn_name) that is called. The reward is

    -1.0                                   does not compile
    -0.6                                   any test ends in an error, a time-out or a killed program
    -0.3 + 1.3 N_pass / (N_pass + N_fail)  else

The paper gives -0.6 to "a runtime error"; that one test is enough for it is the reading of CodeRL
(Le et al. 2022), whose scale this is, and of RLTF (Liu et al. 2023), which added the last line.
There is no reward model: ppo.reward=task.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from marlhf.config import DataConfig
from marlhf.sandbox import Limits, Program, Sandbox, SandboxError, Test, Verdict
from marlhf.tasks import apps_twin
from marlhf.tasks.base import Item, Row, Task, TaskData, normalised, text_of
from marlhf.text import DataError, Example, Prompt

COLUMNS = ("question", "solutions", "input_output", "difficulty", "starter_code")
LONGEST_TESTS = 2**20  # characters of a problem's tests; a few problems have hundreds of megabytes
# Processor time as in the APPS grader; the wall limit only meets programs that sleep, so that a
# busy machine does not change a reward.
LIMITS = Limits(cpu_seconds=4.0, wall_seconds=30.0)
TRUSTED = "programs_may_run_anywhere"  # a row's mark, set here whatever the row says
KNOWN = 2**16  # rewards remembered
FENCE = re.compile(r"^[ \t]*```[^\n]*\n?", re.M)
NEXT_PROBLEM = re.compile(r"^(?:QUESTION|ANSWER):", re.M)


class Tests(NamedTuple):
    """A problem's tests; `function` None: programs read standard input."""

    tests: tuple[Test, ...]
    function: str | None


@lru_cache(maxsize=2**16)
def read_tests(text: str) -> Tests | str:
    """A problem's column input_output, or the reason for which it cannot be used."""
    if not text.strip():
        return "no tests"
    if len(text) > LONGEST_TESTS:
        return "tests of more than a megabyte"
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return "broken tests"
    except ValueError:  # Python's limit on digits, which protects whoever reads it next too
        return "a number of thousands of digits in the tests"
    inputs, outputs = (
        found.get(key) if isinstance(found, dict) else None for key in ("inputs", "outputs")
    )
    if not (isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs)):
        return "broken tests"
    function = found.get("fn_name") or None
    if not inputs:
        return "no tests"
    if function is not None and not (
        isinstance(function, str) and all(isinstance(arguments, list) for arguments in inputs)
    ):
        return "broken tests"
    return Tests(tuple(Test(*pair) for pair in zip(inputs, outputs, strict=True)), function)


def first_solution(text: str) -> str:
    """The first of the solutions, "" where there is none that can be read. Its first line may be
    indented, so only blank lines are taken away before it."""
    try:
        found = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError):
        return ""
    first = found[0] if isinstance(found, list) and found else ""
    if not isinstance(first, str) or not first.strip():
        return ""
    return re.sub(r"\A(?:[ \t\r]*\n)+", "", first).rstrip()


def program_of(response: str) -> str:
    """The program in a response: what its first code fence holds, else all of it, up to a further
    problem, which language models like to go on to. Spaces and line breaks stay as they are."""
    fence = FENCE.search(response)
    if fence:
        before, inside = response[: fence.start()], response[fence.end() :]
        end = FENCE.search(inside)
        # a lone fence after a program closes it; what follows an opening one is the program
        lone = end is None and before.strip() and not inside.strip()
        response = before if lone else inside[: end.start()] if end else inside
    further = NEXT_PROBLEM.search(response)
    return response[: further.start()] if further else response


def reward(verdict: Verdict) -> float:
    """App. B.5, see the head of this file."""
    if not verdict.compiled:
        return -1.0
    if set(verdict.results) - {"passed", "wrong"}:
        return -0.6
    return -0.3 + 1.3 * verdict.passed / len(verdict.results)


class Apps(Task):
    name = "apps"
    hub = "codeparrot/apps"
    folders = ("all",)
    schemas = (COLUMNS,)

    def __init__(self):
        self._boxes: dict[bool, Sandbox] = {}
        self._known: dict[tuple[str, str], float] = {}

    def twin(self, data: DataConfig) -> list[dict]:
        return apps_twin.rows(data.size, data.seed)

    def rows(self, data: DataConfig) -> list[Row]:
        mark = {TRUSTED: data.source == "embedded" or data.allow_unsafe_programs}
        return [row._replace(data={**row.data, **mark}) for row in super().rows(data)]

    def read(self, row: Row) -> Item | str:
        question = text_of(row, row.data["question"], "question").strip()
        starter, solutions, tests = (
            text_of(row, row.data[column], column, empty=True)
            for column in ("starter_code", "solutions", "input_output")
        )
        found = read_tests(tests)
        if isinstance(found, str):
            return found
        way = "Use Call-Based format" if found.function else "Use Standard Input format"
        given = starter.strip("\n") + "\n" if starter.strip() else ""
        prompt = Prompt("QUESTION:\n", question, f"\n{given}{way}\nANSWER:\n")
        key = normalised(prompt.text)
        number = row.data.get("problem_id", row.data.get("id"))
        name = hashlib.sha256(key.encode()).hexdigest()[:12] if number is None else str(number)
        return Item(key, name, prompt, first_solution(solutions))

    def load(self, data: DataConfig) -> TaskData:
        """As every task; the tests, which make the scores, are part of the fingerprint."""
        found = super().load(data)
        digest = hashlib.sha256(found.fingerprint.encode())
        for example in (*found.sft, *found.ppo, *found.valid):
            digest.update(example.row["input_output"].encode("utf-8", "backslashreplace"))
        found.fingerprint = digest.hexdigest()
        return found

    def true_score(self, example: Example, response: str, finished: bool) -> float:
        return self.true_scores([example], [response], [finished])[0]

    def true_scores(
        self, examples: Sequence[Example], responses: Sequence[str], finished: Sequence[bool]
    ) -> list[float]:
        """Rewards of the programs, run together. A program is run once on a problem's tests: what
        it was found to be worth is remembered. Raises DataError for rows from outside where the
        sandbox cannot isolate programs."""
        keys = [
            (example.row["input_output"], program_of(response))
            for example, response in zip(examples, responses, strict=True)
        ]
        if len(self._known) > KNOWN:
            self._known.clear()
        todo = [key for key in dict.fromkeys(keys) if key not in self._known]
        if todo:
            box = self._box(all(example.row.get(TRUSTED, False) for example in examples))
            programs = [Program(source, *read_tests(tests)) for tests, source in todo]
            verdicts = box.run(programs)
            self._known |= dict(zip(todo, map(reward, verdicts), strict=True))
        return [self._known[key] for key in keys]

    def _box(self, trusted: bool) -> Sandbox:
        """A sandbox whose workers stay warm as long as this process lives."""
        if trusted not in self._boxes:
            try:
                box = Sandbox(limits=LIMITS, trusted=trusted)
            except SandboxError as error:
                raise DataError(
                    f"programs for rows from outside are not run here: {error}. Where they may do "
                    "no harm (a machine of their own): data.allow_unsafe_programs=true"
                ) from error
            self._boxes[trusted] = box
            atexit.register(box.close)
        return self._boxes[trusted]

    def best_score(self, example: Example) -> float:
        return 1.0

    def has_truth(self, data: DataConfig) -> bool:
        return True

    def labels(self, example: Example) -> dict[str, str]:
        return {"difficulty": str(example.row["difficulty"])}

    def facts(self, data: DataConfig) -> dict[str, str]:
        trusted = data.source == "embedded" or data.allow_unsafe_programs
        return {"isolation": self._box(trusted).isolation}


task = Apps()
