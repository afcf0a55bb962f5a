"""What a run is, in a hash: the config, data, versions and source that can change its numbers; and
where it was computed, which cannot."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import json
import math
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_STARTED = time.time()
PACKAGE = Path(__file__).resolve().parent
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "accelerate", "peft", "datasets")
# These start, store or draw runs; none of them changes a run's numbers.
NOT_SOURCE = {
    *("", "__main__", "cli", "config", "runs", "identity", "stages", "pool", "experiment"),
    *("plans", "memory", "tracking", "hub"),
    *("placement", "compiled"),  # idle by default; `stages.entry_modules` adds what is not
    *("figures", "claims", "report"),
}


def plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's; what is not finite as null (JSON has neither)."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _digest(value: Any) -> str:
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def run_hash(identity: dict[str, Any]) -> str:
    """Twelve hexadecimal digits of an identity: stage, config, seed, parents, source, versions,
    data. Equal identities are the same run; the order of keys does not matter."""
    return _digest(identity)[:12]


def keyed_rng(*key: int | str) -> np.random.Generator:
    """Randomness by key, such as (seed, stream, update, prompt), never by what was drawn before."""
    plain = [int(k) if isinstance(k, (int, np.integer)) else str(k) for k in key]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(int(_digest(plain), 16))))


@functools.cache
def versions() -> dict[str, str | None]:
    """Versions of what computes; null for a library that is not installed."""
    found: dict[str, str | None] = {"python": ".".join(platform.python_version_tuple()[:2])}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = None
    return found


def _module_file(module: str) -> Path | None:
    """The file of marlhf.<...>, without importing it; None where there is none."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)


def _strip_docstrings(tree: ast.AST) -> None:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = body[0] if body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = body[isinstance(first.value.value, str) :]


def _strip_reexports(tree: ast.Module) -> None:
    """Takes out the module's own `__getattr__`: a lazy re-export computes nothing, for who uses
    the name imports it from its home (tests/test_runs.py holds the package to that)."""
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.FunctionDef) and node.name == "__getattr__")
    ]


def _imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Names that may be modules of marlhf, wherever in the file they are imported."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


@functools.cache
def _read_source(path: Path, module: str, stamp: tuple[int, int]) -> tuple[str, tuple[str, ...]]:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    _strip_reexports(tree)
    imports = tuple(sorted(set(_imported(tree, module, path.name == "__init__.py"))))
    _strip_docstrings(tree)
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imports


def _source(entry_modules: Sequence[str]) -> dict[str, tuple[str, Path]]:
    """Digest and file of the entry modules and of what they import from marlhf, directly or not."""
    for module in entry_modules:
        if _module_file(module) is None:
            raise ValueError(f"no module {module!r} under {PACKAGE}")
    found: dict[str, tuple[str, Path]] = {}
    queue = list(entry_modules)
    while queue:
        module = queue.pop()
        inside = module == "marlhf" or module.startswith("marlhf.")
        left_out = module.partition(".")[2] in NOT_SOURCE and module not in entry_modules
        if module in found or not inside or left_out:
            continue
        path = _module_file(module)
        if path is None:  # a name inside a module, not a module
            continue
        stat = path.stat()
        digest, imports = _read_source(path, module, (stat.st_mtime_ns, stat.st_size))
        found[module] = digest, path
        queue.extend(imports)
    return found


def source_hash(entry_modules: Sequence[str]) -> str:
    """Hash of the entry modules and of what they import from marlhf, directly or not.

    Comments, docstrings and layout do not count, nor do modules that only start, store or draw
    runs. Raises ValueError for an entry module that does not exist.
    """
    return _digest({name: digest for name, (digest, _) in _source(entry_modules).items()})[:16]


def check_source(entry_modules: Sequence[str], expected: str) -> None:
    """Raises ValueError where the code in memory may not be the code that `expected` is the hash
    of: files were edited since the hash was taken, or since this process began."""
    files = [path for _, path in _source(entry_modules).values()]
    edited = sorted(path.name for path in files if path.stat().st_mtime > _STARTED)
    if edited or source_hash(entry_modules) != expected:
        what = ", ".join(edited) or "marlhf"
        raise ValueError(f"{what} was edited since this process began: start it (the kernel) again")


def device_name() -> str:
    """The GPU's name where torch sees one, else the processor's."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def peak_rss_mib() -> float:
    """Most memory that this process has held so far, in MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def git_state() -> dict[str, Any] | None:
    """Revision, and whether marlhf/ or configs/ differ from it; None outside a git checkout."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(PACKAGE.parent), *args]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "marlhf/runs.py")
        dirty = bool(git("status", "--porcelain", "--", "marlhf", "configs"))
        return {"revision": git("rev-parse", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        return None
