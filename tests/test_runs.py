"""Runs: identity, atomic checkpoints, kills, locks, tables."""

import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from marlhf import identity as identity_module
from marlhf.identity import check_source, git_state, plain
from marlhf.runs import Run, atomic_write, keyed_rng, run_hash, source_hash, versions

IDENTITY = {"stage": "toy", "config": {"lr": 0.1}, "seed": 0, "parents": {}, "data": "abc"}


# Identity


def test_hash_is_of_content_not_of_order():
    backwards = dict(reversed(IDENTITY.items()))
    assert run_hash(backwards) == run_hash(IDENTITY)
    assert len(run_hash(IDENTITY)) == 12


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"lr": 0.2}},
        {"seed": 1},
        {"data": "abd"},
        {"parents": {"sft": "1"}},
        {"versions": {"torch": "1"}},
    ],
)
def test_hash_follows_every_part(change):
    assert run_hash(IDENTITY | change) != run_hash(IDENTITY)


def test_keyed_rng_depends_on_the_key_alone():
    first = keyed_rng(3, "rollout", 7, "prompt")
    keyed_rng(3, "rollout", 8, "prompt").random(100)
    again = keyed_rng(np.int64(3), "rollout", np.int32(7), "prompt")
    assert (first.random(5) == again.random(5)).all()
    streams = [("3", "rollout"), (3, "rollout"), (3, "rollout", ""), (3, "evaluation")]
    assert len({keyed_rng(*key).random() for key in streams}) == 4


def test_keyed_rng_never_changes():
    # Not part of the source hash: a change here would change runs without renaming them.
    assert keyed_rng(1, "a").random(2) == pytest.approx([0.0908523130, 0.8812892666], abs=1e-9)


def test_versions_name_what_computes():
    found = versions()
    assert found["python"] == f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert found["torch"]
    assert found["numpy"] == np.__version__


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of its own in marlhf's place; write(name, text) fills it."""
    monkeypatch.setattr(identity_module, "PACKAGE", tmp_path)

    def write(name, text):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))

    write("ppo", "from marlhf import segment\nfrom marlhf.tasks.base import Task\nx = 1\n")
    write("segment", "def f():\n    from . import macro\n    return macro.y\n")
    write("macro", "y = 1\n")
    write("runs", "z = 1\n")
    write("tasks/base", "import marlhf.runs\nfrom ..text import t\nclass Task: pass\n")
    write("text", "t = 1\n")
    write("other", "o = 1\n")
    return write


def test_source_hash_ignores_comments_docstrings_and_layout(package):
    before = source_hash(["marlhf.ppo"])
    package("macro", '"""What it does."""\n\n# a comment\ny = (\n    1\n)\n')
    package(
        "segment", 'def f():\n    """Doc."""\n    from . import macro  # why\n    return macro.y\n'
    )
    package(
        "tasks/base", "import marlhf.runs\nfrom ..text import t\nclass Task:\n    'Doc'\n    pass"
    )
    assert source_hash(["marlhf.ppo"]) == before


@pytest.mark.parametrize("module", ["ppo", "segment", "macro", "tasks/base", "text"])
def test_source_hash_follows_code_however_it_is_imported(package, tmp_path, module):
    before = source_hash(["marlhf.ppo"])
    path = tmp_path / f"{module}.py"
    path.write_text(path.read_text() + "\nadded = 1\n")
    assert source_hash(["marlhf.ppo"]) != before


@pytest.mark.parametrize("module", ["runs", "other"])
def test_source_hash_ignores_what_changes_no_numbers(package, module):
    before = source_hash(["marlhf.ppo"])
    package(module, "changed = 1\n")
    assert source_hash(["marlhf.ppo"]) == before


REEXPORT = """
def __getattr__(name):
    if name != "other":
        raise AttributeError(name)
    from marlhf.other import other

    return other
"""


def test_source_hash_ignores_a_lazy_reexport(package, tmp_path):
    """It computes nothing; a method of that name does."""
    before = source_hash(["marlhf.ppo"])
    path = tmp_path / "segment.py"
    text = path.read_text()
    path.write_text(text + REEXPORT)
    assert source_hash(["marlhf.ppo"]) == before
    path.write_text(text + "class Lazy:\n" + textwrap.indent(REEXPORT, "    "))
    assert source_hash(["marlhf.ppo"]) != before


def test_nothing_in_marlhf_takes_a_name_from_its_reexport():
    """Or the hash of what it computes would miss the module that the name comes from."""
    home = Path(identity_module.__file__).parent
    trees = {path: ast.parse(path.read_text()) for path in home.rglob("*.py")}
    lazy = {
        path.relative_to(home).as_posix()
        for path, tree in trees.items()
        if any(isinstance(n, ast.FunctionDef) and n.name == "__getattr__" for n in tree.body)
    }
    assert lazy == {"__init__.py", "segment.py"}  # the package's own is in no hash
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "marlhf.segment":
                assert "Constituency" not in [alias.name for alias in node.names], path
            named = isinstance(node, ast.Attribute) and node.attr == "Constituency"
            assert not named, path


def test_source_hash_of_no_module():
    with pytest.raises(ValueError, match=r"no module 'marlhf\.nothing'"):
        source_hash(["marlhf.nothing"])


def test_code_that_was_edited_under_a_process_does_not_compute(package, tmp_path, monkeypatch):
    expected = source_hash(["marlhf.ppo"])
    monkeypatch.setattr(identity_module, "_STARTED", time.time() + 1)
    check_source(["marlhf.ppo"], expected)
    with pytest.raises(ValueError, match="marlhf was edited since this process began"):
        check_source(["marlhf.ppo"], "hash of other code")
    os.utime(tmp_path / "text.py", (time.time() + 9,) * 2)
    with pytest.raises(ValueError, match=r"text\.py was edited"):
        check_source(["marlhf.ppo"], expected)


def test_git_state_is_absent_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(identity_module, "PACKAGE", tmp_path / "marlhf")
    assert git_state() is None


def test_git_state_sees_what_is_not_committed(tmp_path, monkeypatch):
    monkeypatch.setattr(identity_module, "PACKAGE", tmp_path / "marlhf")
    (tmp_path / "marlhf").mkdir()
    (tmp_path / "marlhf" / "runs.py").write_text("")

    def git(*args):
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "-C", tmp_path, *who, *args], check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = git_state()
    (tmp_path / "notes.txt").write_text("outside what computes")
    assert git_state() == clean == {"revision": clean["revision"], "dirty": False}
    (tmp_path / "marlhf" / "runs.py").write_text("changed")
    assert git_state() == {"revision": clean["revision"], "dirty": True}


# A toy run: what it computes depends on all steps before, as training does


def train(run, steps=6):
    found = run.resume()
    step, total = 0, 0
    if found:
        step, total = found[0], int((found[1] / "total.txt").read_text())
        assert (found[1] / "more" / "check.txt").read_text() == str(total)
    run.log("evals", {"step": 0}) if step == 0 else None
    while step < steps:
        step, total = step + 1, total * 3 + step
        run.log("metrics", {"step": step, "total": total})
        run.progress(step, steps)
        if step == 4:
            run.log("samples", {"step": step})
        if step % 2 == 0:

            def write(folder, total=total):
                (folder / "total.txt").write_text(str(total))
                (folder / "more").mkdir()
                (folder / "more" / "check.txt").write_text(str(total))

            run.save_checkpoint(step, write)
    run.save_model(lambda folder: (folder / "weights").write_text(str(total)))
    run.finish({"total": total})


def contents(path):
    """Every file of a run's folder but what tells the time."""
    found = {}
    for file in sorted(p for p in Path(path).rglob("*") if p.is_file()):
        text = file.read_text()
        if file.name == "manifest.json":
            kept = ("summary", "identity", "hash")
            text = {key: json.loads(text)[key] for key in kept}
        found[str(file.relative_to(path))] = text
    return found


@pytest.fixture
def expected(tmp_path):
    with Run.open("toy", "run", IDENTITY, tmp_path / "unbroken") as run:
        train(run)
    return contents(run.path)


def test_a_finished_run_is_found_under_any_name(tmp_path):
    with Run.open("toy", "one name", IDENTITY, tmp_path) as run:
        train(run)
    again = Run.open("toy", "another", IDENTITY, tmp_path)
    assert again.finished
    assert again.path == run.path == tmp_path / "toy" / f"one-name-{run_hash(IDENTITY)}"
    assert sorted(os.listdir(run.path)) == [
        "config.json", "evals.jsonl", "manifest.json", "metrics.jsonl", "model", "samples.jsonl",
    ]  # fmt: skip


def test_manifest_says_what_where_and_how_long(tmp_path):
    with Run.open("toy", "run", IDENTITY, tmp_path, config={"name": "p"}) as run:
        run.finish({"score": np.float32(0.5), "none": float("nan")})
    manifest = Run(run.path).manifest
    assert manifest["summary"] == {"score": 0.5, "none": None}
    assert (manifest["stage"], manifest["name"], manifest["seed"]) == ("toy", "run", 0)
    assert (manifest["config"], manifest["identity"]) == ({"name": "p"}, IDENTITY)
    assert manifest["wall_seconds"] >= 0
    assert manifest["peak_rss_mib"] > 1
    assert manifest["device"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in marlhf catches it."""


def die_at(monkeypatch, count):
    """From now on the count-th operation on a file is half done, and the process is gone."""
    left = [count]

    def patch(owner, name, half=None):
        real = getattr(owner, name)

        def wrapper(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                if half:
                    half(real, *args)
                raise Killed
            return None if name == "fsync" else real(*args, **kwargs)  # disks are slow

        monkeypatch.setattr(owner, name, wrapper)

    def half_content(real, path, content, *_):
        real(path, content[: len(content) // 2])

    def half_tree(_, path, *__):
        files = sorted(p for p in Path(path).rglob("*") if p.is_file())
        for file in files[: len(files) // 2 + 1]:
            os.remove(file)

    for name in ("fsync", "rename", "replace", "truncate"):
        patch(os, name)
    patch(shutil, "rmtree", half_tree)
    patch(Path, "write_text", half_content)
    patch(Path, "write_bytes", half_content)
    patch(Path, "mkdir")
    patch(Path, "unlink")
    return left


def test_killed_at_every_operation_it_ends_the_same(tmp_path, expected):
    kills = 0
    while True:
        kills += 1
        root = tmp_path / f"kill{kills}"
        with pytest.MonkeyPatch.context() as patched:
            die_at(patched, kills)
            try:
                with Run.open("toy", "run", IDENTITY, root) as run:
                    if not run.finished:
                        train(run)
                survived = True
            except Killed:
                survived = False
        with Run.open("toy", "run", IDENTITY, root) as run:
            if not run.finished:
                train(run)
        assert contents(run.path) == expected, f"killed at operation {kills}"
        assert not list(run.path.glob(".tmp-*")), f"killed at operation {kills}"
        if survived:
            break
    assert kills > 60


def test_killed_while_it_resumes_it_ends_the_same(tmp_path, expected):
    """A kill after step 5, then one at each operation of the resume."""
    for second in range(1, 40):
        root = tmp_path / f"kill{second}"
        for count in (50, second, None):
            with pytest.MonkeyPatch.context() as patched:
                if count:
                    die_at(patched, count)
                try:
                    with Run.open("toy", "run", IDENTITY, root) as run:
                        if not run.finished:
                            train(run)
                except Killed:
                    pass
        assert contents(run.path) == expected


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_runs import IDENTITY, Run, train
with Run.open("toy", "run", IDENTITY, {root!r}) as run:
    if not run.finished:
        print("computing", flush=True)
        train(run, steps={steps})
"""


def start(root, steps=6, **kwargs):
    code = SCRIPT.format(tests=str(Path(__file__).parent), root=str(root), steps=steps)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, **kwargs)


def test_sigkill_at_random_moments(tmp_path):
    with Run.open("toy", "run", IDENTITY, tmp_path / "unbroken") as run:
        train(run, steps=120)
    expected = contents(run.path)
    rng, killed, resumed = random.Random(0), 0, 0
    for _ in range(12):
        process = start(tmp_path / "killed", steps=120)
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.05))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
        found = Run.find("toy", run_hash(IDENTITY), tmp_path / "killed")
        resumed += bool(found.latest_checkpoint())
    process = start(tmp_path / "killed", steps=120)
    assert process.wait() == 0
    process.stdout.close()
    found = Run.find("toy", run_hash(IDENTITY), tmp_path / "killed")
    assert contents(found.path) == expected
    assert killed >= 2
    assert resumed >= 1


# Locks


def test_a_second_process_waits_and_finds_the_run_finished(tmp_path):
    run = Run.open("toy", "run", IDENTITY, tmp_path)
    other = start(tmp_path, stderr=subprocess.PIPE)
    try:
        assert b"waiting for another process" in other.stderr.readline()
        assert other.poll() is None
        train(run)
        assert other.wait(timeout=20) == 0
        assert other.stdout.read() == b""  # it computed nothing
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
        other.stderr.close()


def test_the_lock_dies_with_its_process(tmp_path):
    code = SCRIPT.format(tests=str(Path(__file__).parent), root=str(tmp_path), steps=6)
    code = code.replace("train(run, steps=6)", "import time; time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"computing\n"
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with Run.open("toy", "run", IDENTITY, tmp_path) as run:
        assert not run.finished


def test_one_process_cannot_compute_a_run_twice_at_once(tmp_path):
    with (
        Run.open("toy", "run", IDENTITY, tmp_path),
        pytest.raises(RuntimeError, match="is being computed by this process"),
    ):
        Run.open("toy", "run", IDENTITY, tmp_path)
    Run.open("toy", "run", IDENTITY, tmp_path).close()


# Tables and checkpoints


def test_tables_are_cut_back_to_the_checkpoint(tmp_path):
    with Run.open("toy", "run", IDENTITY, tmp_path) as run:
        run.log("metrics", {"step": 1})
        run.save_checkpoint(1, lambda folder: None)
        run.log("metrics", {"step": 2})
        run.log("evals", {"step": 2})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # killed while writing
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3 is not JSON"):
        run.frame("metrics")
    with Run.open("toy", "run", IDENTITY, tmp_path) as run:
        step, _ = run.resume()
        assert step == 1
        assert run.frame("metrics")["step"].tolist() == [1]
        with pytest.raises(ValueError, match="no table 'evals'; its tables: metrics"):
            run.frame("evals")


def test_without_a_checkpoint_it_begins_anew(tmp_path):
    with Run.open("toy", "run", IDENTITY, tmp_path) as run:
        run.log("metrics", {"step": 1})
    (run.path / "checkpoints" / ".tmp-00000001.1.77").mkdir(parents=True)
    with Run.open("toy", "run", IDENTITY, tmp_path) as run:
        assert run.resume() is None
        assert run.tables == {}
        assert os.listdir(run.path / "checkpoints") == []


def test_a_table_that_lost_rows_is_not_trusted(tmp_path):
    with Run.open("toy", "run", IDENTITY, tmp_path) as run:
        run.log("metrics", {"step": 1})
        run.save_checkpoint(1, lambda folder: None)
        (run.path / "metrics.jsonl").write_text("")
        with pytest.raises(ValueError, match="lost rows"):
            run.resume()
        (run.path / "metrics.jsonl").unlink()
        with pytest.raises(ValueError, match="lost its tables metrics"):
            run.resume()


def test_only_the_latest_checkpoints_are_kept(tmp_path):
    with Run.open("toy", "run", IDENTITY, tmp_path) as run:
        for step in range(1, 12):
            run.save_checkpoint(step, lambda folder: None, keep=2)
        names = sorted(os.listdir(run.path / "checkpoints"))
        assert names == ["00000010.1", "00000011.1"]
        assert run.latest_checkpoint() == (11, run.path / "checkpoints" / "00000011.1")


def test_a_step_can_be_saved_again(tmp_path):
    with Run.open("toy", "run", IDENTITY, tmp_path) as run:
        for text in ("first", "second"):
            run.save_checkpoint(3, lambda folder, t=text: (folder / "f").write_text(t))
        step, folder = run.latest_checkpoint()
        assert (step, (folder / "f").read_text()) == (3, "second")
        assert len(os.listdir(run.path / "checkpoints")) == 1


def test_a_failed_checkpoint_leaves_the_old_one(tmp_path):
    def fail(folder):
        (folder / "half").write_text("")
        raise OSError("disk full")

    with Run.open("toy", "run", IDENTITY, tmp_path) as run:
        run.save_checkpoint(1, lambda folder: None)
        with pytest.raises(OSError, match="disk full"):
            run.save_checkpoint(2, fail)
        assert run.resume()[0] == 1
        assert os.listdir(run.path / "checkpoints") == ["00000001.1"]


def test_seconds_are_summed_over_resumes(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("marlhf.runs.time.monotonic", lambda: clock[0])
    with Run.open("toy", "run", IDENTITY, tmp_path) as run:
        run.resume()
        clock[0] += 5
        run.save_checkpoint(1, lambda folder: None)
        clock[0] += 100  # lost with the kill
    clock[0] += 1000
    with Run.open("toy", "run", IDENTITY, tmp_path) as run:
        run.resume()
        clock[0] += 2
        run.finish({})
    assert Run(run.path).manifest["wall_seconds"] == 7


def test_rows_come_back_as_they_were(tmp_path):
    with Run.open("toy", "run", IDENTITY, tmp_path) as run:
        run.log("t", {"i": np.int64(1), "f": np.float32(0.5), "s": "é\u2028\n", "n": None})
        run.log("t", {"i": 2, "f": float("inf"), "s": "", "n": None})
        frame = run.frame("t")
    assert frame["i"].tolist() == [1, 2]
    assert frame["f"].tolist()[0] == 0.5
    assert np.isnan(frame["f"][1])
    assert frame["s"].tolist() == ["é\u2028\n", ""]
    assert frame["n"].dtype == float
    assert (run.path / "t.jsonl").read_bytes().count(b"\n") == 2


def test_plain_leaves_nothing_that_json_lacks():
    tree = plain({1: (np.float64("nan"), [np.bool_(True)]), "a": np.int8(3)})
    assert tree == {"1": [None, [True]], "a": 3}


def test_model_folder_is_replaced_whole(tmp_path):
    with Run.open("toy", "run", IDENTITY, tmp_path) as run:
        run.save_model(lambda folder: (folder / "old").write_text("1"))
        run.save_model(lambda folder: (folder / "new").write_text("2"))
        assert os.listdir(run.path / "model") == ["new"]


def test_progress_is_a_file_to_watch(tmp_path):
    with Run.open("toy", "run", IDENTITY, tmp_path) as run:
        run.progress(1, 4)
        row = json.loads((run.path / "progress.json").read_text())
        assert (row["done"], row["total"]) == (1, 4)
        run.finish({})
    assert not (run.path / "progress.json").exists()


def test_reading_what_is_not_finished(tmp_path):
    assert Run.find("toy", run_hash(IDENTITY), tmp_path) is None
    with Run.open("toy", "run", IDENTITY, tmp_path) as run:
        assert run.identity == IDENTITY
    assert "unfinished" in repr(Run(run.path))
    with pytest.raises(ValueError, match="is no finished run"):
        _ = Run(run.path).manifest


def test_atomic_write_replaces_and_leaves_nothing(tmp_path):
    for content in ("text", b"bytes"):
        atomic_write(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == b"bytes"
    assert os.listdir(tmp_path) == ["file"]
