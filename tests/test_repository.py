"""What a clone promises: the lock covers what is asked for, files name no machine."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HOME = Path(__file__).resolve().parent.parent
TEXT = {".py", ".md", ".toml", ".yml", ".yaml", ".ipynb", ".lock", ".txt", ".csv", ".json", ""}


def lock():
    lines = (HOME / "requirements.lock").read_text().splitlines()
    pins = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    for pin in pins:
        assert re.fullmatch(r"[A-Za-z0-9_.\-]+==[0-9][A-Za-z0-9.]*", pin), pin
    names = [canonicalize_name(pin.split("==")[0]) for pin in pins]
    assert len(set(names)) == len(names)
    return dict(zip(names, [pin.split("==")[1] for pin in pins], strict=True))


def project():
    return tomllib.loads((HOME / "pyproject.toml").read_text())


def tracked():
    """Files that git has or would take; skipped outside a checkout."""
    command = ["git", "-C", str(HOME), "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [HOME / name for name in done.stdout.splitlines() if (HOME / name).is_file()]


def test_the_lock_covers_pyproject():
    pins, settings = lock(), project()
    asked = settings["project"]["dependencies"] + settings["build-system"]["requires"]
    for group in settings["dependency-groups"].values():
        asked += group
    for text in asked:
        requirement = Requirement(text)
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin, f"{requirement.name} is not in requirements.lock"
        assert requirement.specifier.contains(pin), f"{text} against {pin}"


def test_what_is_imported_is_asked_for():
    """Every third-party module imported by the library is a dependency, not a leftover."""
    settings, names = project(), {"yaml": "pyyaml", "PIL": "pillow"}
    # widgets are imported where a notebook wants them
    needed = settings["project"]["dependencies"] + settings["dependency-groups"]["notebooks"]
    asked = {canonicalize_name(Requirement(text).name) for text in needed}
    # of omegaconf, matplotlib, transformers, ipykernel
    asked |= {"pyyaml", "pillow", "huggingface-hub", "ipython"}
    pattern = re.compile(r"^\s*(?:from|import) ([A-Za-z_]\w*)", re.M)
    for path in (HOME / "marlhf").rglob("*.py"):
        code = re.sub(r'""".*?"""', "", path.read_text(encoding="utf-8"), flags=re.S)
        for module in set(pattern.findall(code)) - {"marlhf"} - sys.stdlib_module_names:
            name = canonicalize_name(names.get(module, module))
            assert name in asked, f"{path.name} imports {module}"


def test_the_environment_is_that_of_the_lock():
    wrong = []
    for name, pin in lock().items():
        try:
            found = version(name).split("+")[0]
        except PackageNotFoundError:
            found = None
        wrong += [f"{name}: {found}, the lock says {pin}"] if found != pin else []
    assert not wrong, "run `make setup`: " + "; ".join(wrong)


def test_conda_gets_the_same_versions():
    environment = yaml.safe_load((HOME / "environment.yml").read_text())
    packages = environment["dependencies"]
    (pip,) = [p["pip"] for p in packages if isinstance(p, dict)]
    assert pip[0] == "-r requirements.lock"
    assert [p for p in packages if str(p).startswith("python=")] == ["python=3.11"]
    assert "torch" in lock()


def test_files_name_no_machine():
    pattern = re.compile(r"(?<![\w.$}])/(?:home|root|Users|work|tmp)/[\w.]+|\blocalhost:\d+")
    found = []
    for path in tracked():
        if path.suffix not in TEXT or path.stat().st_size > 3_000_000 or path == Path(__file__):
            continue
        for match in pattern.finditer(path.read_text(encoding="utf-8", errors="ignore")):
            found.append(f"{path.relative_to(HOME)}: {match.group()}")
    assert not found


def test_runs_and_environments_are_not_committed():
    for path in tracked():
        parts = path.relative_to(HOME).parts
        assert parts[0] not in {".venv", "runs"}, path
        assert parts[:2] != ("results", "smoke"), path


def test_make_lists_its_targets():
    done = subprocess.run(["make", "-C", str(HOME)], capture_output=True, text=True, check=True)
    for target in ("reproduce", "test", "lab", "bench", "lint", "plan", "stress", "figure"):
        assert f"{target} " in done.stdout


def test_ci_passes_the_status_of_make_on(tmp_path):
    (tmp_path / ".ci").mkdir()
    script = tmp_path / ".ci" / "run"
    script.write_text((HOME / ".ci" / "run").read_text())
    for line, status in (("1 failed, 2 passed in 3s", 2), ("2 passed in 3s", 0)):
        (tmp_path / "Makefile").write_text(f"test:\n\t@echo '=== {line} ==='\n\t@exit {status}\n")
        done = subprocess.run(["bash", script], capture_output=True, text=True)
        assert (done.returncode != 0) == (status != 0)
        assert done.stdout.splitlines()[-1] == f"=== {line} ==="


def test_the_readme_names_what_there_is():
    """Files and functions of the map exist, and every module is on it."""
    text = (HOME / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## Map of the code") : text.index("## Licence")]
    named = set(re.findall(r"`(\w+\.py)`", table))
    library = {path.name for path in (HOME / "marlhf").glob("*.py")}
    assert named <= library
    assert library - named <= {"__init__.py", "__main__.py"}
    for name, function in (
        ("macro.py", "def macro_gae("),
        ("objectives.py", "def token_rewards("),
        ("runs.py", "def resume("),
        ("runs.py", "def save_checkpoint("),
        ("ppo.py", "def train("),
        ("stages.py", "def stage_spec("),
        ("identity.py", "def run_hash("),
        ("segment.py", "TERMINATIONS"),
    ):
        assert function in (HOME / "marlhf" / name).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert link.startswith("results/") or (HOME / link).exists(), link


def test_the_readmes_own_task_is_one_file_that_runs(tmp_path):
    """In a copy, as a reader would: the file is put in its place, and the command is given."""
    text = (HOME / "README.md").read_text(encoding="utf-8").split("## Your own task")[1]
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    for folder in ("marlhf", "configs"):
        shutil.copytree(
            HOME / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    (tmp_path / "marlhf" / "tasks" / "backwards.py").write_text(code)
    command = [
        sys.executable,
        "-m",
        "marlhf",
        "ppo",
        "tldr-smoke",
        "--task",
        "backwards",
        "--quiet",
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "MARLHF_RUNS": str(tmp_path / "runs")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "BACKWARDS:" in done.stdout and "true score" in done.stdout
    (row,) = (tmp_path / "runs" / "sft").glob("*/manifest.json")
    assert json.loads(row.read_text())["summary"]["best_score"] == 3
