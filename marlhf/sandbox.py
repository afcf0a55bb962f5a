"""Runs programs that nobody trusts against tests (App. B.5: APPS).

A pool of warm workers, each inside namespaces of its own (`sandbox_isolation`), runs every test of
every program in fresh processes (`sandbox_worker`) and reports what it printed or returned; the
judging happens here, so that expected outputs never come near a program. docs/sandbox.md says what
holds under which isolation.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import queue
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from marlhf.sandbox_isolation import KINDS, Plan, Worker, WorkerDied, plans

PASSED, WRONG, ERROR = "passed", "wrong", "runtime error"
TIMEOUT, KILLED, COMPILE = "time-out", "killed", "compile error"


class SandboxError(RuntimeError):
    """The sandbox cannot run as it was asked to; the message names the options."""


@dataclass(frozen=True)
class Limits:
    """What one test of a program may use."""

    cpu_seconds: float = 2.0
    wall_seconds: float = 4.0
    memory_mib: int = 256  # address space, the interpreter's own included
    output_kib: int = 64  # standard output, standard error and a function's value, each
    file_kib: int = 64  # the largest file; all files together at most 16 times that
    processes: int = 16  # threads at once; where seccomp works there is only one process

    def __post_init__(self):
        least = {"memory_mib": 64, "file_kib": 0, "processes": 1, "output_kib": 1}
        for field in dataclasses.fields(self):
            value, at_least = getattr(self, field.name), least.get(field.name, 0.01)
            if not value >= at_least:
                raise ValueError(f"{field.name}={value}: at least {at_least}")


@dataclass(frozen=True)
class Test:
    """`input` is standard input, or a function's arguments; `expected` what it should print, or
    return."""

    __test__ = False  # nothing for pytest to collect

    input: Any
    expected: Any


@dataclass(frozen=True)
class Program:
    """`function` None: standard input to standard output. A name: that function, or the method of
    that name of `class Solution`, is called with the arguments."""

    source: str
    tests: Sequence[Test]
    function: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What became of a program: of each test "passed", "wrong", "runtime error", "time-out" or
    "killed" (by a limit or a signal), or "compile error" for all of them. `message`: what the first
    failure said, in a line."""

    compiled: bool
    results: tuple[str, ...]
    message: str = ""

    @property
    def passed(self) -> int:
        return self.results.count(PASSED)

    @property
    def failed(self) -> int:
        return len(self.results) - self.passed


def _number(token: str) -> float | None:
    try:
        return float(token)
    except ValueError:
        return None


def same_output(printed: str, expected: str) -> bool:
    """Line by line, blank lines and the space around words aside. A word that is expected with a
    decimal point or an exponent may differ by 1e-8 + 1e-5 |x|, as in the APPS grader."""

    def words(text: str) -> list[list[str]]:
        return [line.split() for line in text.splitlines() if line.strip()]

    def same(word: str, wanted: str) -> bool:
        if word == wanted:
            return True
        if not any(c in wanted for c in ".eE"):
            return False
        a, b = _number(word), _number(wanted)
        return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-8)

    found, wanted = words(printed), words(expected)
    return len(found) == len(wanted) and all(
        len(a) == len(b) and all(map(same, a, b)) for a, b in zip(found, wanted, strict=True)
    )


def same_value(value: Any, expected: Any) -> bool:
    """Equal as JSON (tuples are lists, keys are strings); an expected value wrapped in a list of
    one, as APPS often has it, also counts, as in its grader."""
    expected = json.loads(json.dumps(expected))
    return value == expected or (
        isinstance(expected, list) and len(expected) > 0 and value == expected[0]
    )


def _text(value: Any) -> str:
    """Standard input or output; APPS has some as lists of lines."""
    return "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def judge(program: Program, test: Test, report: dict[str, Any], limits: Limits) -> tuple[str, str]:
    """A test's result and a line on why, from the worker's report."""
    code, error = report["code"], report["err"]
    if report["why"] == "wall":
        return TIMEOUT, f"more than {limits.wall_seconds:g} s"
    if report["why"] == "output":
        return KILLED, f"more than {limits.output_kib} KiB of output"
    if report["cpu"] > limits.cpu_seconds or code == -signal.SIGXCPU:
        return TIMEOUT, f"more than {limits.cpu_seconds:g} s of processor time"
    if code < 0:
        return KILLED, f"ended by signal {-code}"
    if code > 0:
        return ERROR, error or f"exit status {code}"
    if program.function is None:
        same = same_output(report["out"], _text(test.expected))
        return (PASSED, "") if same else (WRONG, "another output")
    try:
        value = json.loads(report["result"])
    except ValueError:
        return WRONG, "no value that JSON has"
    return (PASSED, "") if same_value(value, test.expected) else (WRONG, "another value")


@functools.cache
def _working_plan(isolation: str | None) -> Plan:
    """The best plan whose worker starts and judges a program right."""
    probe = Program("print(int(input()) + 1)", [Test("1\n", "2")])
    said = []
    for plan in plans(isolation):
        worker = None
        try:
            worker = Worker(plan)
            verdict = _run_program(worker, probe, Limits(wall_seconds=20.0, cpu_seconds=10.0))
            if verdict.passed:
                return plan
            said.append(f"{plan.kind}: {verdict.message}")
        except (OSError, WorkerDied) as error:
            said.append(f"{plan.kind}: {error}")
        finally:
            if worker is not None:
                worker.close()
    raise SandboxError(
        f"isolation={isolation!r} does not work here ({'; '.join(said) or 'absent'})"
    )


@functools.cache
def _say_once(kind: str) -> None:
    print(f"sandbox: programs run under {kind}", file=sys.stderr, flush=True)


def _run_program(worker: Worker, program: Program, limits: Limits) -> Verdict:
    stdin = program.function is None
    message = {
        "source": program.source,
        "function": program.function,
        "inputs": [_text(t.input) if stdin else list(t.input) for t in program.tests],
        "limits": dataclasses.asdict(limits),
    }
    worker.write(message)
    results, why = [], ""
    for test in program.tests:
        report = worker.read(limits.wall_seconds + limits.cpu_seconds + 15)
        if "lost" in report or report["stage"][:1] == "?":
            result, said = KILLED, report.get("lost") or report["stage"][1:]
        elif report["stage"] != "+":
            said = report["stage"][1:].strip().rsplit("\n", 1)[-1] or "the compiler did not finish"
            return Verdict(False, (COMPILE,) * len(program.tests), said[:300])
        else:
            result, said = judge(program, test, report, limits)
        results.append(result)
        why = why or said[:300]
    return Verdict(True, tuple(results), why)


def default_workers() -> int:
    """Half as many again as processors: a worker often waits for the kernel to clear away."""
    if hasattr(os, "sched_getaffinity"):  # Linux: those that this process may use
        processors = len(os.sched_getaffinity(0))
    else:
        processors = os.cpu_count() or 1
    return processors + max(1, processors // 2)


class Sandbox:
    """A pool of workers, used as a context manager.

    workers: how many at once; None: half as many again as processors. trusted: the programs are
    known to be harmless, which is what isolation "limits" needs. isolation: "bubblewrap", "unshare"
    or "limits"; None: the best that works here. The attribute `isolation` says which is in force.

    Raises SandboxError if the isolation does not work here, or if only "limits" does and `trusted`
    is False.
    """

    def __init__(
        self,
        workers: int | None = None,
        limits: Limits = Limits(),
        trusted: bool = False,
        isolation: str | None = None,
    ):
        if isolation not in (None, *KINDS):
            raise SandboxError(f"isolation={isolation!r}: not one of {', '.join(KINDS)}")
        if workers is not None and workers < 1:
            raise SandboxError(f"workers={workers}: at least 1")
        self._plan = _working_plan(isolation)
        self.isolation = self._plan.kind
        if self.isolation == "limits" and not trusted:
            raise SandboxError(
                "neither bubblewrap nor unshare isolates programs here, and limits alone do not "
                "hold what nobody trusts: install bubblewrap or allow user namespaces, or pass "
                "trusted=True (data.allow_unsafe_programs=true in a config) if they are harmless"
            )
        _say_once(self.isolation)
        self._closed = False
        self._turn = threading.Lock()
        self._threads: list[threading.Thread] = []
        self.limits = limits
        self._workers: list[Worker | None] = [None] * (workers or default_workers())

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers and whatever they run, a `run` in another thread too."""
        self._closed = True
        for worker in self._workers:
            if worker is not None:
                worker.kill()
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            if worker is not None:
                worker.close()
        self._workers = []

    def _one(self, slot: int, program: Program) -> Verdict:
        """A program on the worker of this slot; a worker that dies is replaced, once for it."""
        said = ""
        for _ in range(2):
            try:
                worker = self._workers[slot] = self._workers[slot] or Worker(self._plan)
                return _run_program(worker, program, self.limits)
            except WorkerDied as error:
                said = f"the worker died: {error}"
                if self._workers[slot] is not None:
                    self._workers[slot].close()
                    self._workers[slot] = None
            if self._closed:  # from another thread: what runs is given up
                break
        return Verdict(True, (KILLED,) * len(program.tests), said[:300])

    def run(self, programs: Sequence[Program]) -> list[Verdict]:
        """A verdict for each program, in order. Raises ValueError for a program without tests or
        with arguments that are not a list or tuple of what JSON has."""
        if self._closed:
            raise SandboxError("this sandbox is closed")
        for row, program in enumerate(programs):
            if not program.tests:
                raise ValueError(f"program {row} has no tests")
            if program.function is not None:
                _check_arguments(row, program)
        verdicts: list[Verdict | None] = [None] * len(programs)
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(programs)):
            todo.put(index)
        failures: list[BaseException] = []

        def work(slot: int) -> None:
            try:
                while not failures and not self._closed:
                    index = todo.get_nowait()
                    verdicts[index] = self._one(slot, programs[index])
            except queue.Empty:
                pass
            except BaseException as error:
                failures.append(error)

        count = min(len(self._workers), len(programs))
        with self._turn:
            self._threads = [
                threading.Thread(target=work, args=(slot,), daemon=True) for slot in range(count)
            ]
            for thread in self._threads:
                thread.start()
            for thread in self._threads:
                thread.join()
        if failures:
            raise failures[0]
        if self._closed:
            raise SandboxError("this sandbox was closed while it ran")
        return verdicts


def _check_arguments(row: int, program: Program) -> None:
    for number, test in enumerate(program.tests):
        where = f"program {row}, test {number}"
        if not isinstance(test.input, (list, tuple)):
            raise ValueError(f"{where}: arguments of {program.function} are not a list or tuple")
        try:
            json.dumps([list(test.input), test.expected])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None
