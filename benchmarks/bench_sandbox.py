"""Programs judged a second: the sandbox's warm workers against one interpreter a test.

    python -m benchmarks.bench_sandbox [--out FILE.json] [--programs 256] [--workers N] [--rounds 3]

A batch of small programs, each on its three tests, every test in a process of its own. The plain
way is subprocess.run([python, "-c", source]) for each test, as many at once as the sandbox has
workers, with no isolation, no limit but time, and the start of an interpreter each time. All ways
take turns in one run, so that a busy machine slows all alike; the ratio of medians is what counts.
Exit status 1 if programs judged under namespaces are fewer than 100 a second.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from marlhf.sandbox import (
    Program,
    Sandbox,
    SandboxError,
    Test,
    default_workers,
    same_output,
)
from marlhf.sandbox_isolation import KINDS

TARGET = 100.0
SOURCES = (
    "n = int(input())\nprint(sum(i * i for i in range(n)))",
    "n = int(input())\na, b = 0, 1\nfor _ in range(n):\n    a, b = b, a + b\nprint(a)",
    "n = int(input())\nprint(*sorted(str(n * 7919)))",
    "n = int(input())\nprint([d for d in range(1, n + 1) if n % d == 0])",
    "from collections import Counter\nn = int(input())\nprint(Counter(str(2**n)).most_common(1))",
    "import math\nprint(math.gcd(int(input()), 360))",
    "n = int(input())\nwhile n > 1:\n    n = n // 2 if n % 2 == 0 else 3 * n + 1\nprint(n)",
    "def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\n\nprint(f(int(input()) % 12))",
)


def interpreter_a_test(source: str, given: str) -> str:
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=10)
    return done.stdout


def batch(count: int) -> list[Program]:
    """Programs whose expected outputs are their own, run the plain way beforehand."""
    answers = {
        (source, n): interpreter_a_test(source, f"{n}\n") for source in SOURCES for n in (3, 8, 12)
    }
    tests = {source: [Test(f"{n}\n", answers[source, n]) for n in (3, 8, 12)] for source in SOURCES}
    chosen = [SOURCES[i % len(SOURCES)] for i in range(count)]
    return [Program(source, tests[source]) for source in chosen]


def plain(programs: list[Program], workers: int) -> bool:
    def passed(program: Program) -> bool:
        return all(
            same_output(interpreter_a_test(program.source, t.input), t.expected)
            for t in program.tests
        )

    with ThreadPoolExecutor(workers) as pool:
        return all(pool.map(passed, programs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the numbers here, as JSON")
    parser.add_argument("--programs", type=int, default=256)
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    programs = batch(options.programs)
    ways = {"one interpreter a test": lambda: plain(programs, options.workers)}
    boxes = []
    for kind in KINDS:
        try:
            box = Sandbox(options.workers, trusted=True, isolation=kind)
        except SandboxError as error:
            print(error, file=sys.stderr)
            continue
        box.run(programs[:8])  # the workers start
        boxes.append(box)
        ways[kind] = lambda box=box: all(not v.failed for v in box.run(programs))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, run in ways.items():
            began = time.perf_counter()
            assert run(), f"{way}: a program failed its tests"
            seconds[way].append(time.perf_counter() - began)
    for box in boxes:
        box.close()
    rates = {way: len(programs) / statistics.median(s) for way, s in seconds.items()}
    yardstick = rates["one interpreter a test"]
    print(f"{len(programs)} programs x 3 tests, {options.workers} at once, medians of rounds")
    for way, rate in rates.items():
        print(f"{way:24s} {rate:7.1f} programs/s   {rate / yardstick:5.2f} x")
    if options.out:
        numbers = {"programs_per_second": rates, "seconds": seconds, **vars(options)}
        options.out.write_text(json.dumps(numbers, default=str, indent=1) + "\n")
    best = max((rates[k] for k in ("bubblewrap", "unshare") if k in rates), default=0.0)
    if best < TARGET:
        print(f"target missed: {best:.1f} of {TARGET:g} programs/s under namespaces")
    return int(best < TARGET)


if __name__ == "__main__":
    sys.exit(main())
