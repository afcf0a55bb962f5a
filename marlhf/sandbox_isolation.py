"""How the sandbox's workers are started: inside namespaces made by bubblewrap or by util-linux
`unshare`, or, where neither works, under resource limits alone."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlhf import sandbox_locks, sandbox_program, sandbox_worker

KINDS = ("bubblewrap", "unshare", "limits")  # the strongest first
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_SKIPPED = {"antigravity", "idlelib", "this", "tkinter", "turtle", "turtledemo", "test"}
# Fixed string hashes: the same program on the same test prints its sets in the same order.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}
_USERS = range(60706, 61184)  # that neither distributions nor systemd give to anyone


@functools.cache
def interpreter() -> str:
    """The Python under any virtual environment: it needs no site-packages."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@functools.cache
def runtime() -> tuple[str, ...]:
    """The folders and files that a Python needs to run: the interpreter, the standard library and
    the folders of the shared libraries that it loads."""
    script = (
        "import contextlib, importlib, sys\n"
        f"for name in sorted(sys.stdlib_module_names - {_SKIPPED!r}):\n"
        "    with contextlib.suppress(BaseException): importlib.import_module(name)\n"
        "print(*sorted({l.split(maxsplit=5)[5].strip() for l in open('/proc/self/maps')"
        " if '.so' in l}), sep='\\n')"
    )
    done = subprocess.run([interpreter(), "-s", "-S", "-P", "-B", "-c", script], env=_ENVIRONMENT,
                          capture_output=True, text=True, stdin=subprocess.DEVNULL)  # fmt: skip
    folders = {os.path.dirname(line) for line in done.stdout.splitlines() if line[:1] == "/"}
    folders.add(sysconfig.get_path("stdlib"))
    folders |= {p for p in ("/lib", "/lib64") if os.path.isdir(p) and not os.path.islink(p)}
    if os.path.isdir("/usr/lib64") and os.path.islink("/lib64"):
        folders.add("/usr/lib64")
    kept = [f for f in sorted(folders) if not any(f.startswith(g + "/") for g in folders)]
    return (*kept, interpreter())


def _links() -> dict[str, str]:
    """/lib and its like where they are symbolic links, as on merged-/usr systems."""
    return {p: os.readlink(p) for p in ("/lib", "/lib64") if os.path.islink(p)}


def _may_change_user() -> bool:
    """Whether this is root, with other users to become."""
    if os.geteuid() != 0:
        return False
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/uid_map").read_text().splitlines():
            first, _, count = map(int, line.split())
            if first <= _USERS[0] and _USERS[-1] < first + count:
                return True
        return False
    return True


def _claim_user() -> tuple[int, socket.socket]:
    """A user for one worker alone, and what holds the claim until it is closed: a name that no two
    processes can bind. A user of two workers would have its processes counted and killed by both.
    """
    claim = socket.socket(socket.AF_UNIX)
    for uid in random.SystemRandom().sample(_USERS, len(_USERS)):
        with contextlib.suppress(OSError):
            if sys.platform == "linux":
                claim.bind(f"\0marlhf-sandbox-user-{uid}")
            return uid, claim
    claim.close()
    raise OSError(f"all {len(_USERS)} users of sandbox workers are in use")


def _own_tasks() -> int | None:
    """Threads that this user runs now: what RLIMIT_NPROC counts. None where it is not known."""
    total = 0
    try:
        for entry in os.scandir("/proc"):
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and entry.stat().st_uid == os.getuid():
                    total += len(os.listdir(f"/proc/{entry.name}/task"))
    except OSError:
        return None
    return total or None


@dataclass(frozen=True)
class Plan:
    """One way to start a worker; `why` says what failed if it did not start."""

    kind: str
    other_user: bool = False  # as root: programs run as a user that is nobody's
    seccomp: bool = True

    def command(self, folder: str, uid: int | None) -> list[str]:
        """The worker's command line; `folder` is its own, private and empty."""
        worker = sandbox_worker.__file__
        setup: dict[str, Any] = {
            "uid": uid,
            "namespaces": self.kind != "limits",
            "seccomp": self.seccomp,
            "folder": folder,
            "root": None,
            "library": None,
            "tasks": 0,
        }
        rootless = not self.other_user
        if rootless and self.kind != "limits":
            setup["tasks"] = 8  # the worker's own; a user namespace has a count of its own
            if tuple(map(int, platform.release().split("-")[0].split(".")[:2])) < (5, 14):
                own = _own_tasks()
                setup["tasks"] = own and own + 256
        elif self.kind == "limits" and rootless:
            own = _own_tasks()
            setup["tasks"] = own and own + 256  # others of this user may start some, too
        python = [interpreter(), "-s", "-S", "-P", "-B", "-X", "utf8"]
        if self.kind == "bubblewrap":
            options = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
            if rootless:
                options += ["--unshare-user", "--uid", "1000", "--gid", "1000"]
            options += ["--as-pid-1", "--cap-add", "ALL", "--hostname", "sandbox", "--clearenv"]
            libraries = ":".join(path for path in runtime() if os.path.isdir(path))
            for name, value in {**_ENVIRONMENT, "LD_LIBRARY_PATH": libraries}.items():
                options += ["--setenv", name, value]
            parents = {str(p) for path in (*runtime(), *_DEVICES) for p in Path(path).parents}
            for path in sorted(parents - {"/"}):
                options += ["--dir", path]  # else readable by their owner alone
            for path in runtime():
                options += ["--ro-bind", path, path]
            for path, target in _links().items():
                options += ["--symlink", target, path]
            for path in _DEVICES:
                options += ["--dev-bind", path, path]
            for module in (sandbox_worker, sandbox_program, sandbox_locks):
                options += [
                    "--ro-bind",
                    module.__file__,
                    f"/worker/marlhf/{Path(module.__file__).name}",
                ]
            options += [
                "--dir",
                "/worker",
                "--dir",
                "/worker/marlhf",
                "--dir",
                "/box",
                "--chdir",
                "/box",
                "--remount-ro",
                "/",
            ]
            inside = f"/worker/marlhf/{Path(worker).name}"
            return ["bwrap", *options, *python, inside, json.dumps(setup)]
        if self.kind == "unshare":
            setup |= {"root": folder, "binds": [*runtime(), *_DEVICES], "links": _links()}
            options = ["--mount", "--pid", "--net", "--ipc", "--uts", "--fork"]
            if rootless:
                options += ["--map-user=1000", "--map-group=1000", "--keep-caps"]
            return ["unshare", *options, *python, worker, json.dumps(setup)]
        if self.other_user and not _open_to_all(sysconfig.get_path("stdlib")):
            setup["library"] = sysconfig.get_path("stdlib")
        return [*python, worker, json.dumps(setup)]


def _open_to_all(path: str) -> bool:
    return all(p.stat().st_mode & 1 for p in [Path(path), *Path(path).parents])


def plans(isolation: str | None) -> list[Plan]:
    """What to try, the best first; one kind alone if it is named."""
    root = _may_change_user()
    tries = []
    for kind, tool in (("bubblewrap", "bwrap"), ("unshare", "unshare")):
        if isolation in (None, kind) and sys.platform == "linux" and shutil.which(tool):
            tries += [Plan(kind, other_user=True)] * root + [Plan(kind)]
    if isolation in (None, "limits"):
        tries += [Plan("limits", other_user=True)] * root + [Plan("limits")]
    return tries


class WorkerDied(RuntimeError):
    """The worker ended, or did not answer in time; the message is what it said last."""


class Worker:
    """One running worker: its process, its private folder, and messages to and fro."""

    def __init__(self, plan: Plan):
        self.folder = tempfile.mkdtemp(prefix="marlhf-sandbox-")
        if plan.other_user:
            os.chmod(self.folder, 0o711)
        uid, self.claim = _claim_user() if plan.other_user else (None, None)
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the worker)
        try:
            self.process = subprocess.Popen(
                plan.command(self.folder, uid),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                env={"PATH": os.environ.get("PATH", os.defpath), **_ENVIRONMENT},
                cwd="/",
                start_new_session=True,
            )
        except OSError:
            shutil.rmtree(self.folder, ignore_errors=True)
            if self.claim is not None:
                self.claim.close()
            raise
        try:
            self.read(20)  # it says when it is warm
        except WorkerDied:
            self.close()
            raise

    def write(self, message: Any) -> None:
        try:
            sandbox_worker.send(self.process.stdin.fileno(), message)
        except OSError as error:
            raise WorkerDied(str(error)) from None

    def read(self, seconds: float) -> Any:
        """The next message. Raises WorkerDied if there is none in time."""
        fd, deadline = self.process.stdout.fileno(), time.monotonic() + seconds
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        data, size = b"", 4
        while len(data) < size:
            if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
                raise WorkerDied(f"no answer in {seconds:g} s")
            part = os.read(fd, min(size - len(data), 1 << 20))
            if not part:
                self.errors.seek(0)
                raise WorkerDied(self.errors.read().decode(errors="replace").strip()[-500:])
            data += part
            if size == 4 and len(data) == 4:
                size += int.from_bytes(data, "big")
        return json.loads(data[4:])

    def kill(self) -> None:
        """End it and all that it started: with process 1 of a namespace its processes end."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """End it, and give back what it held."""
        self.kill()
        for stream in (self.process.stdin, self.process.stdout, self.errors, self.claim):
            with contextlib.suppress(OSError, AttributeError):
                stream.close()
        with contextlib.suppress(OSError):
            sandbox_worker.remove_tree(self.folder)
