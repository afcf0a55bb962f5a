"""Every hostile program under every isolation that works here, in random order, against one pool
of workers; a good program after each."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hostile import HOSTILE, Hostile

from marlhf.sandbox import Limits, Program, Sandbox, SandboxError, Test, Verdict
from marlhf.sandbox_locks import can_filter

LIMITS = Limits(cpu_seconds=1.0, wall_seconds=1.2, memory_mib=96)  # most wait for the wall
GOOD = Program("print(sum(map(int, input().split())))", [Test("1 2 3", "6")])
VARIABLE = "MARLHF_SANDBOX_CANARY"
DOCS = Path(__file__).parents[1] / "docs/sandbox.md"


@pytest.fixture
def targets(monkeypatch):
    """Things of this process to reach for: they must be there, and unharmed after."""
    monkeypatch.setenv(VARIABLE, "canary")
    folder = Path(tempfile.mkdtemp(prefix="marlhf-canary-"))  # as open as a home folder may be
    folder.chmod(0o777)
    file = folder / "file"
    file.write_text("canary")
    file.chmod(0o666)
    bystander = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    listener = socket.create_server(("127.0.0.1", 0))
    datagrams = socket.socket(type=socket.SOCK_DGRAM)
    datagrams.bind(("127.0.0.1", 0))
    abstract = socket.socket(socket.AF_UNIX)
    name = f"\0marlhf-canary-{os.getpid()}"
    if sys.platform == "linux":
        abstract.bind(name)
        abstract.listen()
    yield {
        "file": str(file),
        "home": str(folder),
        "pid": bystander.pid,
        "port": listener.getsockname()[1],
        "datagram": datagrams.getsockname()[1],
        "socket": name,
        "variable": VARIABLE,
    }
    alive = bystander.poll() is None
    bystander.kill()
    bystander.wait()
    for one in (listener, datagrams, abstract):
        one.close()
    shutil.rmtree(folder)
    assert alive, "a program killed a process outside"


def as_program(hostile: Hostile, targets: dict) -> Program:
    given = json.dumps(targets) + "\n" if hostile.function is None else [1]
    tests = [Test(given, hostile.expected)] * hostile.repeat
    return Program(hostile.source, tests, hostile.function)


def held(hostile: Hostile, verdict: Verdict) -> bool:
    return set(verdict.results) <= set(hostile.classes)


def run_all(isolation: str, targets: dict, chosen=HOSTILE) -> dict[str, Verdict]:
    """Verdicts by name. A good program follows each, and every one of those passes."""
    order = random.Random(time.time_ns()).sample(chosen, len(chosen))
    print("order:", *(h.name for h in order))  # pytest shows it when something fails
    try:
        box = Sandbox(workers=3, limits=LIMITS, trusted=True, isolation=isolation)
    except SandboxError as error:
        pytest.skip(str(error))
    with box:
        programs = [p for h in order for p in (as_program(h, targets), GOOD)]
        verdicts = box.run(programs)
    spoiled = [(h.name, v) for h, v in zip(order, verdicts[1::2], strict=True) if v.failed]
    assert not spoiled, f"a good program failed after {spoiled}"
    return dict(zip((h.name for h in order), verdicts[::2], strict=True))


@pytest.mark.parametrize("isolation", ["bubblewrap", "unshare"])
def test_namespaces_hold_every_program(isolation, targets):
    verdicts = run_all(isolation, targets)
    wrong = {h.name: verdicts[h.name] for h in HOSTILE if not held(h, verdicts[h.name])}
    assert not wrong
    assert Path(targets["file"]).read_text() == "canary"
    assert os.listdir(targets["home"]) == ["file"]


@pytest.mark.skipif(not can_filter(), reason="without seccomp they would harm this very session")
def test_limits_hold_all_but_the_listed_programs(targets):
    verdicts = run_all("limits", targets)
    wrong = {h.name: verdicts[h.name] for h in HOSTILE if not held(h, verdicts[h.name])}
    assert not {
        name: v for name, v in wrong.items() if name in {h.name for h in HOSTILE if h.limits}
    }
    assert "read-etc" in wrong, "limits alone do not hide files: the list is out of date"


def test_documentation_lists_what_limits_do_not_hold():
    text = DOCS.read_text().split("<!-- not held by limits: begin -->")[1].split("<!--")[0]
    assert re.findall(r"^- `([\w-]+)`", text, re.M) == [h.name for h in HOSTILE if not h.limits]


def test_suite_is_large_and_its_names_are_its_own():
    assert len(HOSTILE) >= 60
    assert len({h.name for h in HOSTILE}) == len(HOSTILE)
    assert all("passed" not in h.classes for h in HOSTILE)
