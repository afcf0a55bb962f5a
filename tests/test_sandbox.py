"""What a verdict is, what a program may count on, and what happens to workers that die."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from marlhf import sandbox, sandbox_isolation
from marlhf.sandbox import (
    Limits,
    Program,
    Sandbox,
    SandboxError,
    Test,
    Verdict,
    same_output,
    same_value,
)

APPS = Path(__file__).parents[1] / "../shared/data/apps/train_150.jsonl"
ECHO = "print(input())"


@pytest.fixture(scope="module")
def box():
    """Under the best isolation that works here."""
    with Sandbox(workers=2, limits=Limits(wall_seconds=2.0), trusted=True) as box:
        yield box


@pytest.fixture(scope="module", params=sandbox_isolation.KINDS)
def each(request):
    """Under each isolation that works here."""
    try:
        box = Sandbox(workers=1, limits=Limits(1.0, 9.0), trusted=True, isolation=request.param)
    except SandboxError as error:
        pytest.skip(str(error))
    with box:
        yield box


def judge(box: Sandbox, source: str, given="", expected="yes", function=None) -> Verdict:
    return box.run([Program(textwrap.dedent(source), [Test(given, expected)], function)])[0]


def test_classes_are_told_apart(each):
    programs = {
        "passed": "print(2)",
        "wrong": "print(3)",
        "runtime error": "1 / 0",
        "time-out": "while True: pass",
        "killed": "import ctypes; ctypes.string_at(0)",
        "compile error": "print(",
    }
    verdicts = each.run([Program(s, [Test("", "2")] * 2) for s in programs.values()])
    assert [v.results for v in verdicts] == [(name,) * 2 for name in programs]
    assert [v.compiled for v in verdicts] == [True] * 5 + [False]
    assert [(v.passed, v.failed) for v in verdicts] == [(2, 0)] + [(0, 2)] * 5
    assert [v.message for v in verdicts] == [
        "",
        "another output",
        "ZeroDivisionError: division by zero",
        "more than 1 s of processor time",
        "ended by signal 11",
        "SyntaxError: '(' was never closed",
    ]


def test_each_test_of_a_program_has_its_own_result(each):
    source = "n = int(input())\nprint(10 // n if n < 5 else 0)"
    tests = [Test("2", "5"), Test("0", "1"), Test("3", "3"), Test("9", "1")]
    verdict = each.run([Program(source, tests)])[0]
    assert verdict.results == ("passed", "runtime error", "passed", "wrong")
    assert verdict.message.startswith("ZeroDivisionError")


def test_order_is_kept(box):
    programs = [Program(f"print({i})", [Test("", str(i))]) for i in range(40)]
    programs[7] = Program("import time; time.sleep(9)", [Test("", "7")])
    verdicts = box.run(programs)
    assert [i for i, v in enumerate(verdicts) if not v.passed] == [7]
    assert box.run([]) == []


@pytest.mark.parametrize(
    "printed, expected, same",
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1  2 \n\n 3", "1 2\n3\n\n", True),
        ("1 2 3", "1 2\n3", False),  # lines count
        ("1 2", "1 2 3", False),
        ("", "", True),
        ("0.5", "0.50", True),
        ("0.333333333", "0.3333333333333", True),
        ("0.3334", "0.3333333333333", False),
        ("1e-9", "0.0", True),
        ("2.0", "2", False),  # a whole number is expected as such
        ("nan", "1.0", False),
        ("YES", "Yes", False),
    ],
)
def test_output_is_compared_by_lines_and_words(printed, expected, same):
    assert same_output(printed, expected) is same


@pytest.mark.parametrize(
    "value, expected, same",
    [
        ([1, 2], (1, 2), True),
        ({"1": 2}, {1: 2}, True),
        (3, [3], True),  # APPS wraps single values
        ([3], [3], True),
        ([3], 3, False),
        ([], [], True),
        (None, [], False),
        (True, True, True),
        (0.1 + 0.2, 0.3, False),
    ],
)
def test_values_are_compared_as_json(value, expected, same):
    assert same_value(value, expected) is same


def test_functions_and_methods_are_called(each):
    method = "class Solution:\n  def pair(self, a: List[int], b: int):\n    return max(a), b"
    assert judge(each, method, ([1, 3, 2], 5), [3, 5], "pair").passed
    assert judge(each, "def pair(a, b): return {a: b}", [1, 2], {"1": 2}, "pair").passed
    assert judge(each, "def f(d): return d[1]", [{1: "yes"}], ["yes"], "f").passed
    assert judge(
        each, "print('noise')\ndef f(): print('more'); return 'yes'", [], "yes", "f"
    ).passed
    assert judge(each, "def g(): return 1", [], 1, "f").results == ("runtime error",)
    assert judge(each, "def f(): return {1, 2}", [], [1, 2], "f").results == ("wrong",)
    assert judge(each, "def f(): return object()", [], 1, "f").results == ("wrong",)


def test_programs_have_a_standard_library_and_a_folder(each):
    source = """
        import decimal, sqlite3, hashlib, lzma, xml.dom.minidom, concurrent.futures, queue, os
        open("a.txt", "w").write("yes")
        os.mkdir("b")
        assert os.listdir() in (["a.txt", "b"], ["b", "a.txt"])
        def main():
            sys.stdout.write(open("a.txt").read())
        import sys, threading
        sys.setrecursionlimit(10**6)
        threading.stack_size(64 << 20)
        def deep(n): return n and deep(n - 1)
        thread = threading.Thread(target=lambda: (deep(50000), main()))
        thread.start()
    """
    assert judge(each, source).results == ("passed",)


def test_a_program_may_be_the_body_of_a_function(box):
    source = """
        from math import sqrt
        n = 3
        def up():
            nonlocal n
            n += 1
        up()
        print("yes" if n == 4 and sqrt(4) == 2 else "no")
        return
        print("more")
    """
    assert judge(box, source).passed
    assert not judge(box, "return 1", [], 1, "f").compiled  # not where a function is asked for


def test_exit_codes(box):
    assert judge(box, "print('yes'); raise SystemExit").passed
    assert judge(box, "import sys; print('yes'); sys.exit(0)").passed
    assert judge(box, "import atexit; atexit.register(print, 'yes')").passed
    assert judge(box, "print('yes'); exit(2)").results == ("runtime error",)


def test_the_same_program_prints_the_same(box):
    source = "import random; print(random.random(), list({'a', 'b', 'c', 'd', 'e'}))"
    program = Program(source + "\n1 / 0 if input() else 0", [Test("", "x")])
    found = set()
    for _ in range(3):
        with Sandbox(workers=2, trusted=True) as other:
            worker = other._workers[0] = sandbox_isolation.Worker(other._plan)
            sent = {"source": source, "function": None, "inputs": ["", ""]}
            worker.write({**sent, "limits": vars(Limits())})
            found |= {worker.read(10)["out"], worker.read(10)["out"]}
            assert other.run([program])[0].failed
    assert len(found) == 1


def test_text_in_other_scripts(box):
    assert judge(box, ECHO, "Größe → 数\n", "Größe → 数").passed
    assert judge(box, "print(len(input()))", "é" * 1000 + "\n", "1000").passed
    assert judge(box, ECHO, ["yes", "no"], ["yes"]).passed  # APPS: lines as a list


def test_large_input_and_output(box):
    many = " ".join(["12345"] * 200_000)
    assert judge(box, "print(sum(map(int, input().split())))", many, str(12345 * 200_000)).passed
    assert judge(box, "print('x' * 60_000)", "", "x" * 60_000).passed
    assert judge(box, "print('x' * 70_000)", "", "x" * 70_000).results == ("killed",)


def test_limits_are_those_asked_for():
    limits = Limits(cpu_seconds=0.3, wall_seconds=9.0, memory_mib=64, output_kib=1, file_kib=1)
    with Sandbox(workers=1, limits=limits, trusted=True) as box:
        busy = "import time\nwhile time.process_time() < 0.5: pass\nprint('yes')"
        assert judge(box, busy).message == "more than 0.3 s of processor time"
        assert judge(box, "x = bytearray(60 << 20)").message == "MemoryError"
        assert judge(box, "print('x' * 1100)").message == "more than 1 KiB of output"
        filler = "with open('a', 'w') as file: file.write('x' * 1100)"
        assert "File too large" in judge(box, filler).message
    with Sandbox(workers=1, limits=Limits(wall_seconds=0.5), trusted=True) as box:
        assert judge(box, "import time; time.sleep(5)").message == "more than 0.5 s"


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"memory_mib": 8}, "memory_mib=8: at least 64"),
        ({"cpu_seconds": 0}, "cpu_seconds=0: at least"),
        ({"wall_seconds": float("nan")}, "wall_seconds=nan"),
        ({"processes": 0}, "processes=0: at least 1"),
    ],
)
def test_limits_that_nothing_can_run_in_are_errors(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Limits(**wrong)


def test_wrong_arguments_are_named(box):
    good = Program(ECHO, [Test("", "")])
    for program, message in (
        (Program(ECHO, []), "program 1 has no tests"),
        (Program(ECHO, [Test("ab", "")], "f"), "program 1, test 0: arguments of f are not a list"),
        (Program(ECHO, [Test([1], 1), Test([{1}], 1)], "f"), "program 1, test 1: .*set"),
    ):
        with pytest.raises(ValueError, match=message):
            box.run([good, program])
    with pytest.raises(SandboxError, match="workers=0"):
        Sandbox(workers=0)
    with pytest.raises(SandboxError, match="isolation='jail': not one of bubblewrap, unshare"):
        Sandbox(isolation="jail")


def test_limits_alone_are_refused_unless_trusted():
    with pytest.raises(SandboxError, match="trusted=True"):
        Sandbox(isolation="limits")
    with Sandbox(isolation="limits", trusted=True) as box:
        assert box.isolation == "limits"


def test_the_best_isolation_is_chosen_and_said_once(tmp_path):
    """With bwrap, with unshare alone, with neither: as PATH has them."""
    script = (
        "from marlhf.sandbox import Program, Sandbox, Test\n"
        "for _ in range(2):\n"
        " with Sandbox(workers=1, trusted=True) as box:\n"
        "  print(box.isolation, box.run([Program('print(1)', [Test('', '1')])])[0].passed)\n"
    )
    best = sandbox._working_plan(None).kind
    for tools in (("bwrap", "unshare"), ("unshare",), ()):
        folder = tmp_path / "-".join(("bin", *tools))
        folder.mkdir()
        for tool in tools:
            if found := sandbox_isolation.shutil.which(tool):
                (folder / tool).symlink_to(found)
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PATH": str(folder)},
            capture_output=True,
            text=True,
            check=True,
        )
        kind = done.stdout.split()[0]
        assert done.stdout == f"{kind} 1\n" * 2
        assert done.stderr.count("sandbox: programs run under") == 1
        assert kind == best if len(tools) == 2 else kind != "bubblewrap"
        assert tools or kind == "limits"


def test_a_worker_that_dies_is_replaced(box):
    assert judge(box, "print('yes')").passed
    for worker in box._workers:
        if worker is not None:
            os.killpg(worker.process.pid, signal.SIGKILL)
    verdicts = box.run([Program("print('yes')", [Test("", "yes")])] * 6)
    assert [v.passed for v in verdicts] == [1] * 6


def test_a_program_whose_workers_die_twice_is_killed(box, monkeypatch):
    real = sandbox._run_program

    def deadly(worker, program, limits):
        if "deadly" in program.source:
            os.killpg(worker.process.pid, signal.SIGKILL)
        return real(worker, program, limits)

    monkeypatch.setattr(sandbox, "_run_program", deadly)
    good = Program("print('yes')", [Test("", "yes")])
    verdicts = box.run([good, Program("'deadly'", [Test("", "")] * 2), good, good])
    assert [v.results for v in verdicts] == [("passed",), ("killed",) * 2, *[("passed",)] * 2]
    assert "the worker died" in verdicts[1].message


def test_closing_ends_every_process_and_removes_every_folder():
    with Sandbox(workers=2, trusted=True) as box:
        box.run([Program("print(1)", [Test("", "1")])] * 4)
        workers = [w for w in box._workers if w is not None]
        assert workers
    for worker in workers:
        assert worker.process.returncode is not None
        assert not Path(worker.folder).exists()
    with pytest.raises(SandboxError, match="closed"):
        box.run([])


def test_closing_from_another_thread_gives_up_what_runs():
    box = Sandbox(workers=1, limits=Limits(5.0, 20.0), trusted=True)
    programs = [Program("import time; time.sleep(19)", [Test("", "")])] * 3
    said = []

    def run():
        with pytest.raises(SandboxError) as caught:
            box.run(programs)
        said.append(str(caught.value))

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(1.0)
    began = time.monotonic()
    box.close()
    thread.join(10)
    assert not thread.is_alive() and time.monotonic() - began < 5
    assert said == ["this sandbox was closed while it ran"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_end_with_their_parent(each):
    script = (
        "import os, sys\nfrom marlhf.sandbox import Program, Sandbox, Test\n"
        "box = Sandbox(workers=1, trusted=True, isolation=sys.argv[1])\n"
        "box.run([Program('print(1)', [Test('', '1')])])\n"
        "print(box._workers[0].process.pid, box._workers[0].folder, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, each.isolation], capture_output=True, text=True
    )
    pid, folder = done.stdout.split()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
            break  # ended; nobody has asked how
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists()
    Path(folder).rmdir()


# Why the first solution of a problem fails: a fact about the problem, found by hand.
SEVERAL_ANSWERS = {33, 2378, 2398, 2400, 2023, 2029}  # any may be printed, the tests know one
WRONG_ORDER = {2386}  # prints a set; the APPS grader compares sets as a last resort, this does not


@pytest.mark.skipif(not APPS.exists(), reason="needs ../shared/data")
def test_first_solutions_of_real_problems():
    rows = [json.loads(line) for line in APPS.read_text().splitlines()]
    programs = []
    for row in rows:
        data = json.loads(row["input_output"])
        tests = [Test(i, o) for i, o in zip(data["inputs"], data["outputs"], strict=True)]
        programs.append(Program(json.loads(row["solutions"])[0], tests, data.get("fn_name")))
    with Sandbox(trusted=True) as box:
        verdicts = box.run(programs)
    failed = {r["problem_id"] for r, v in zip(rows, verdicts, strict=True) if v.failed}
    assert failed <= SEVERAL_ANSWERS | WRONG_ORDER
    stdin = [v for p, v in zip(programs, verdicts, strict=True) if p.function is None]
    assert len(stdin) == 138 and sum(not v.failed for v in stdin) >= 128
