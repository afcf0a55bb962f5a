"""A run's folder: <root>/<stage>/<name>-<hash>/, root being $MARLHF_RUNS or ./runs.

The hash is of all that can change the run's numbers (`run_hash`), so a finished run is never
computed twice. Its files:

    config.json            what was asked for, to be read by people
    metrics.jsonl ...      tables, a JSON object a line
    checkpoints/<step>.<k> what a killed run goes on from, with the tables' lengths at that step
    model/                 what came out
    progress.json          how far it is, for whoever watches
    manifest.json          written last: a run that has one is finished

Nothing is ever half there: files and folders are written beside their place under a name that
starts with `.tmp-`, flushed to the disk, and renamed. `resume` cuts the tables back to the last
checkpoint, so that a killed run ends as if it had not been killed.

Where several processes compute a run (`marlhf.processes`) process 0 alone locks and writes it, on a
file system that all of them see; the others call the same methods at the same points.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlhf import processes
from marlhf.identity import (
    device_name,
    git_state,
    keyed_rng,
    peak_rss_mib,
    plain,
    run_hash,
    source_hash,
    versions,
)
from marlhf.tracking import start_trackers, track

if TYPE_CHECKING:
    import pandas

__all__ = ["Run", "atomic_write", "keyed_rng", "run_hash", "runs_root", "source_hash", "versions"]

TEMPORARY = ".tmp-"


# Writing so that nothing is half there


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: str | Path, content: str | bytes, durable: bool = True) -> None:
    """The whole file or the old one, whenever the process is killed; `durable` also waits for
    the disk."""
    path = Path(path)
    temporary = path.parent / f"{TEMPORARY}{path.name}.{os.getpid()}"
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    if durable:
        _sync(temporary)
    os.replace(temporary, path)
    if durable:
        _sync(path.parent)


def _temporary_folder(target: Path) -> Path:
    temporary = target.parent / f"{TEMPORARY}{target.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def _put_in_place(temporary: Path, target: Path) -> None:
    """The folder, once it is on the disk, takes the target's name."""
    for path in temporary.rglob("*"):
        _sync(path)
    _sync(temporary)
    if target.exists():
        _remove(target)
    os.rename(temporary, target)
    _sync(target.parent)


def _remove(folder: Path) -> None:
    """Deletes a folder; killed half-way, what is left does not bear the folder's name."""
    rubbish = folder.parent / f"{TEMPORARY}old-{folder.name}.{os.getpid()}"
    shutil.rmtree(rubbish, ignore_errors=True)
    os.rename(folder, rubbish)
    shutil.rmtree(rubbish)


class TrainingError(RuntimeError):
    """Training cannot go on: a loss or score is not finite, or sampler and learner disagree."""


class _Lock:
    """An flock on a file: the kernel lets go of it when the process dies."""

    held: set[Path] = set()  # noqa: RUF012  (of the process, on purpose)

    def __init__(self, path: Path, what: Path):
        if path in self.held:
            raise RuntimeError(f"{what} is being computed by this process: close that Run first")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.file = path, path.open("a+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process, which computes {what}", file=sys.stderr)
            fcntl.flock(self.file, fcntl.LOCK_EX)
        self.held.add(path)

    def release(self) -> None:
        if not self.file.closed:
            self.held.discard(self.path)
            self.file.close()


def runs_root(root: str | Path | None = None) -> Path:
    return Path(root or os.environ.get("MARLHF_RUNS") or "runs").absolute()


class Run:
    """A run's folder (see the head of this file). Use `Run.open` to compute a run, `Run.find` or
    `Run(path)` to read one."""

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        self._lock: _Lock | None = None
        self._writes = processes.main()
        self._trackers: list[Any] = []
        self._identity: dict[str, Any] | None = None
        self._config: dict[str, Any] | None = None
        self._before, self._start, self._progress = 0.0, time.monotonic(), -math.inf
        self.facts: dict[str, Any] = {}  # of this machine, for the summary; no number depends on it

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}{'' if self.finished else ', unfinished'})"

    @staticmethod
    def find(stage: str, identity_hash: str, root: str | Path | None = None) -> Run | None:
        """The folder of that hash, finished or not, under whatever name; None if there is none."""
        folders = sorted((runs_root(root) / stage).glob(f"*-{identity_hash}"))
        return Run(folders[0]) if folders else None

    @classmethod
    def open(
        cls,
        stage: str,
        name: str,
        identity: dict[str, Any],
        root: str | Path | None = None,
        config: dict[str, Any] | None = None,
    ) -> Run:
        """The run of that identity: found, or made. Unless it is finished it is locked, so that
        two processes never compute it at once: the second waits, and finds it finished.

        `config` is written beside it for people to read; it is not part of the identity.
        """
        run = cls._open(stage, name, identity, root, config) if processes.main() else None
        path = processes.share(run and run.path)
        if run is None:
            run = cls(path)
            run._identity, run._config = identity, config or identity["config"]
        return run

    @classmethod
    def _open(cls, stage, name, identity, root, config) -> Run:
        digest, folder = run_hash(identity), runs_root(root) / stage
        found = cls.find(stage, digest, root)
        if found and found.finished and not found.leftovers():
            return found
        safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip(".-")
        lock = _Lock(folder / ".locks" / digest, folder / f"{safe}-{digest}")
        try:
            run = cls.find(stage, digest, root) or cls(folder / f"{safe}-{digest}")
            run._lock, run._identity, run._config = lock, identity, config or identity["config"]
            if run.finished:
                run._clean()
                run.close()
                return run
            run.path.mkdir(parents=True, exist_ok=True)
            run._git = git_state()
            where = runs_root(root) / "trackers"
            run._trackers = start_trackers(run.path.name, where, plain(run._config))
            atomic_write(run.path / "config.json", json.dumps(plain(run._config), indent=1) + "\n")
        except BaseException:
            lock.release()
            raise
        return run

    def close(self) -> None:
        """Lets go of the lock; `finish` does it too."""
        if self._lock:
            self._lock.release()
        while self._trackers:
            self._trackers.pop().finish()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def finished(self) -> bool:
        return (self.path / "manifest.json").is_file()

    @property
    def hash(self) -> str:
        return self.path.name.rpartition("-")[2]

    @property
    def identity(self) -> dict[str, Any]:
        return self._identity if self._identity is not None else self.manifest["identity"]

    @property
    def manifest(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / "manifest.json").read_text())
        except FileNotFoundError:
            raise ValueError(f"{self.path} is no finished run: it has no manifest.json") from None

    @property
    def seconds(self) -> float:
        """Wall seconds that led here, over all resumes; what a kill threw away is not counted."""
        return self._before + time.monotonic() - self._start

    # Tables

    @property
    def tables(self) -> dict[str, Path]:
        """The files of the tables by name."""
        return {path.stem: path for path in sorted(self.path.glob("*.jsonl"))}

    def log(self, table: str, row: dict[str, Any]) -> None:
        """Appends a row to <table>.jsonl, in one write."""
        if not self._writes:
            return
        line = json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n"
        with (self.path / f"{table}.jsonl").open("ab", buffering=0) as file:
            file.write(line.encode())
        if self._trackers:
            track(self._trackers, table, plain(row))

    def frame(self, table: str) -> pandas.DataFrame:
        """The table's rows. Raises ValueError for a table that is not there, or a broken line."""
        import pandas

        tables = self.tables
        if table not in tables:
            known = ", ".join(tables) or "none"
            raise ValueError(f"{self.path} has no table {table!r}; its tables: {known}")
        rows = []
        with tables[table].open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError:
                    where = f"{tables[table]}, line {number}"
                    raise ValueError(f"{where} is not JSON: resume the run to mend it") from None
        frame = pandas.DataFrame(rows)
        empty = [name for name in frame if frame[name].isna().all()]
        return frame.astype(dict.fromkeys(empty, float))

    # Checkpoints

    def _checkpoints(self) -> list[tuple[int, int, Path]]:
        """(step, attempt, folder) of the complete ones, the latest last."""
        folders = (p for p in (self.path / "checkpoints").glob("*") if p.name[0] != ".")
        return sorted((*map(int, folder.name.split(".")), folder) for folder in folders)

    def save_checkpoint(self, step: int, write: Callable[[Path], None], keep: int = 1) -> None:
        """`write` fills a folder; once it is whole on the disk, with the tables' lengths, it
        becomes the checkpoint of that step, and all but the latest `keep` are deleted. Every
        process calls `write`, since each has a part of the state (its random numbers at least)."""
        # A step saved again gets a new name, so that the old one is whole until the new one is.
        attempt = 1 + max((a for s, a, _ in self._checkpoints() if s == step), default=0)
        target = self.path / "checkpoints" / f"{step:08d}.{attempt}"
        temporary = processes.share(_temporary_folder(target) if self._writes else None)
        write(temporary)
        processes.gather(None)  # all have written
        if not self._writes:
            return
        tables = self.tables
        for path in tables.values():
            _sync(path)
        lengths = {name: path.stat().st_size for name, path in tables.items()}
        state = {"step": step, "tables": lengths, "seconds": self.seconds}
        (temporary / "run.json").write_text(json.dumps(state))
        _put_in_place(temporary, target)
        saved = self._checkpoints()
        for _, _, folder in saved[: max(0, len(saved) - keep)]:
            _remove(folder)

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        saved = self._checkpoints()
        return (saved[-1][0], saved[-1][2]) if saved else None

    def resume(self) -> tuple[int, Path] | None:
        """Back to the latest checkpoint, or to nothing: tables cut to their lengths of then,
        half-written folders removed. Call it before computing. Raises ValueError if a table is
        shorter than it was."""
        found = processes.share((self._resume(), self._before) if self._writes else None)
        latest, self._before = found
        self._start = time.monotonic()
        return latest

    def _resume(self) -> tuple[int, Path] | None:
        for parent in (self.path, self.path / "checkpoints"):
            for path in parent.glob(f"{TEMPORARY}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        latest = self.latest_checkpoint()
        state = json.loads((latest[1] / "run.json").read_text()) if latest else {}
        lengths = state.get("tables", {})
        for name, path in self.tables.items():
            if name not in lengths:
                path.unlink()
                continue
            if path.stat().st_size < lengths[name]:
                raise ValueError(f"{path} lost rows since the last checkpoint: delete {self.path}")
            os.truncate(path, lengths[name])
        gone = [name for name in lengths if name not in self.tables]
        if gone:
            raise ValueError(f"{self.path} lost its tables {', '.join(gone)}: delete it")
        self._before = state.get("seconds", 0.0)
        return latest

    # Results

    def save_model(self, write: Callable[[Path], None], name: str = "model") -> None:
        """`write` fills a folder, which becomes <run>/<name> once it is whole."""
        if self._writes:
            temporary = _temporary_folder(self.path / name)
            write(temporary)
            _put_in_place(temporary, self.path / name)

    def progress(self, done: float, total: float) -> None:
        """How far it is, for whoever watches; written at most a few times a second."""
        now = time.monotonic()
        if not self._writes:
            return
        if now - self._progress > 0.25 or done >= total:
            self._progress = now
            row = {"done": done, "total": total, "seconds": self.seconds}
            atomic_write(self.path / "progress.json", json.dumps(plain(row)), durable=False)

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes manifest.json, which makes the run a finished one; then removes checkpoints and
        lets go of the lock. Other processes wait for process 0 here."""
        if self._writes:
            self._finish(summary)
        processes.gather(None)

    def _finish(self, summary: dict[str, Any]) -> None:
        torch = sys.modules.get("torch")
        manifest = {
            "stage": self.path.parent.name,
            "name": self.path.name.rpartition("-")[0],
            "hash": self.hash,
            "seed": self.identity.get("seed"),
            "summary": summary | self.facts,
            "wall_seconds": round(self.seconds, 3),
            "device": device_name(),
            "threads": torch.get_num_threads() if torch else None,
            **({"processes": processes.world()} if processes.world() > 1 else {}),
            "peak_rss_mib": round(peak_rss_mib(), 1),
            **({"git": self._git} if self._git else {}),
            "versions": self.identity.get("versions"),
            "data": self.identity.get("data"),
            "config": self._config,
            "identity": self.identity,
        }
        atomic_write(self.path / "manifest.json", json.dumps(plain(manifest), indent=1) + "\n")
        self._clean()
        self.close()

    def leftovers(self) -> bool:
        """Whether it was killed between its manifest and the end of its tidying up."""
        return (self.path / "checkpoints").exists() or (self.path / "progress.json").exists()

    def _clean(self) -> None:
        for path in self.path.glob(f"{TEMPORARY}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (self.path / "progress.json").unlink(missing_ok=True)
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
