"""The sandbox's worker: a clean, warm interpreter that runs each test of a program in a fork of
itself. Started by `marlhf.sandbox`, inside the namespaces; standard library only.

Three kinds of process under it, so that none that a program can reach matters to the next:

    worker      reads programs on stdin, writes reports on stdout; no program code runs in it
      holder    makes namespaces for one program: processes, mounts, IPC
        guard   process 1 of them: feeds and reads the pipes, keeps the time, kills what is left
          test  one for each test, locked in; compiles and runs the program

Expected outputs never come here: what a test printed or returned is reported and judged outside.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import itertools
import json
import math
import os
import random
import select
import signal
import stat
import struct
import sys
import time
from typing import Any

if not __package__:  # as a script, inside
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from marlhf import sandbox_locks as locks
from marlhf import sandbox_program as test_process

if not __package__:
    del sys.path[0]  # nothing of the project is for programs to import

_exit = os._exit  # as it was before any program could replace it
LINUX = sys.platform == "linux"
LIBRARY = 60  # the descriptor of `_library_by_descriptor`


def send(fd: int, value: Any) -> None:
    """One message: its length in four bytes, then JSON."""
    data = json.dumps(value).encode()
    view = memoryview(struct.pack("!I", len(data)) + data)
    while view:
        view = view[os.write(fd, view) :]


def receive(fd: int) -> Any:
    """The next message; None at the end of the file."""
    head = _exactly(fd, 4)
    data = head and _exactly(fd, struct.unpack("!I", head)[0])
    return json.loads(data) if data else None


def _exactly(fd: int, size: int) -> bytes | None:
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# ---------------------------------------------------------------------------- the guard


def _stdin_file(text: str) -> int:
    data = text.encode(errors="replace")
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("stdin")
    else:
        import tempfile

        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    while data:
        data = data[os.write(fd, data) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _kill_all(pid: int, setup: dict[str, Any]) -> None:
    """The test and everything it started. In a namespace of its own, where this is process 1, the
    kernel knows them all; elsewhere by user, by group and by parent."""
    if setup["namespaces"]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        return
    for target in (pid, -pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(target, signal.SIGKILL)
    if setup["uid"] is not None:
        helper = os.fork()
        if helper == 0:
            try:
                os.setuid(setup["uid"])
                os.kill(-1, signal.SIGKILL)
            finally:
                os._exit(0)
        os.waitpid(helper, 0)


def _kill_adopted() -> None:
    """Orphans that became this process's children, until there are none."""
    while True:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                children = [int(word) for word in file.read().split()]
        except OSError:
            children = []
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0 if children else os.WNOHANG)
        except ChildProcessError:
            return
        if not children:
            return


def guard(setup: dict[str, Any], program: dict[str, Any], inputs: list[Any], report: int) -> None:
    """Run the tests one after the other; a report of each goes to the worker."""
    os.setsid()
    if LINUX:
        locks.hide_memory()
        locks.die_with_parent()
        locks.drop_bounding_set()
        if not setup["namespaces"]:
            locks.adopt_orphans()
    for given in inputs:
        box = _fresh_box(setup, program["limits"])
        try:
            found = _guard_test(setup, program, given, box)
        finally:
            os.chdir("/")
            if not setup["namespaces"]:
                remove_tree(box)
        send(report, found)
        if found["stage"] != "+":
            return


def _fresh_box(setup: dict[str, Any], limits: dict[str, Any]) -> str:
    """The private, empty folder, as working directory."""
    if setup["namespaces"]:
        box, owner = "/box", setup["uid"] if setup["uid"] is not None else os.getuid()
        options = f"size={16 * limits['file_kib']}k,nr_inodes=256,mode=700,uid={owner}"
        locks.unmount(box)
        locks.mount_tmpfs(box, options)
    else:
        box = f"{setup['folder']}/{os.getpid()}-{time.monotonic_ns()}"
        os.mkdir(box, 0o700)
        if setup["uid"] is not None:
            os.chown(box, setup["uid"], -1)
    os.chdir(box)
    os.environ.update({"HOME": box, "TMPDIR": box, "LANG": "C.UTF-8"})
    return box


def _start_test(
    setup: dict[str, Any], program: dict[str, Any], given: Any, pipes: list[tuple[int, int]]
) -> int:
    stdin = _stdin_file(given if program["function"] is None else "")
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setsid()
            kept = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in (stdin, *(w for _, w in pipes))]
            for target, fd in enumerate(kept):
                os.dup2(fd, target)
            os.closerange(len(kept), LIBRARY)
            os.closerange(LIBRARY + 1, 256)
            try:
                test_process.lock_in(setup, program["limits"])
            except BaseException as error:
                os.write(4, f"?{type(error).__name__}: {error}"[:500].encode())
                raise
            code = test_process.run_test(program, given, status=4, result=3)
        finally:
            _exit(code)
    os.close(stdin)
    return pid


def _guard_test(
    setup: dict[str, Any], program: dict[str, Any], given: Any, box: str
) -> dict[str, Any]:
    """Run one test and say what it printed and how it ended."""
    limits = program["limits"]
    pipes = [os.pipe() for _ in range(4)]  # stdout, stderr, result, status
    deadline = time.monotonic() + limits["wall_seconds"]
    pid = _start_test(setup, program, given, pipes)
    texts: dict[int, bytearray] = {}
    poll = select.poll()
    for reader, writer in pipes:
        os.close(writer)
        os.set_blocking(reader, False)
        texts[reader] = bytearray()
        poll.register(reader, select.POLLIN)
    watch = -1
    with contextlib.suppress(AttributeError, OSError):  # Linux 5.3; elsewhere it looks now and then
        watch = os.pidfd_open(pid)
        poll.register(watch, select.POLLIN)
    ceiling = limits["output_kib"] << 10
    why, ended = "", None
    while ended is None and not why:
        left = deadline - time.monotonic()
        if left <= 0:
            why = "wall"
            break
        for fd, _ in poll.poll(math.ceil(1000 * (left if watch >= 0 else min(0.005, left)))):
            if fd == watch:
                ended = os.wait4(pid, 0)
                continue
            data = os.read(fd, 65536)
            texts[fd] += data
            if not data:
                poll.unregister(fd)
            if len(texts[fd]) > ceiling:
                why = "output"
        if watch < 0 and ended is None and (found := os.wait4(pid, os.WNOHANG))[0]:
            ended = found
    _kill_all(pid, setup)
    _, status, used = ended or os.wait4(pid, 0)
    if setup["namespaces"]:
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()
    elif LINUX:
        _kill_adopted()
    for fd, text in texts.items():  # what the pipes still held
        with contextlib.suppress(BlockingIOError):
            while len(text) <= ceiling and (data := os.read(fd, 65536)):
                text += data
        if len(text) > ceiling:
            why = why or "output"
        os.close(fd)
    if watch >= 0:
        os.close(watch)
    out, err, result, stage = (bytes(t[:ceiling]).decode(errors="replace") for t in texts.values())
    return {
        "code": os.waitstatus_to_exitcode(status),
        "cpu": used.ru_utime + used.ru_stime,
        "why": why,
        "stage": stage,
        "out": out,
        "result": result,
        "err": err.strip().rsplit("\n", 1)[-1][-500:],
    }


def remove_tree(folder: str) -> None:
    """`folder` and all in it, however deep and whatever the permissions: what has children is
    emptied into the top, so that no path grows."""
    os.chmod(folder, 0o700)
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    turn = itertools.count()
    try:
        while names := os.listdir(top):
            for name in names:
                if not stat.S_ISDIR(os.lstat(name, dir_fd=top).st_mode):
                    os.unlink(name, dir_fd=top)
                    continue
                os.chmod(name, 0o700, dir_fd=top)
                inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
                for child in os.listdir(inner):
                    moved = f"{os.getpid()}-{random.random()}-{next(turn)}"
                    os.rename(child, moved, src_dir_fd=inner, dst_dir_fd=top)
                os.close(inner)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(folder)


# ---------------------------------------------------------------------------- the worker


def _holder(setup: dict[str, Any], program: dict[str, Any], inputs: list[Any], report: int) -> None:
    os.dup2(os.open("/dev/null", os.O_RDWR), 0)
    os.dup2(0, 1)
    if setup["namespaces"]:
        locks.die_with_parent()
        locks.unshare(locks.CLONE_NEWPID | locks.CLONE_NEWNS | locks.CLONE_NEWIPC)
        pid = os.fork()
        if pid:
            os.close(report)
            os.waitpid(pid, 0)
            return
    guard(setup, program, inputs, report)


def run_program(setup: dict[str, Any], program: dict[str, Any], out: int) -> None:
    """A report of each test, whatever it does; none after one that did not compile."""
    inputs, limits = program["inputs"], program["limits"]
    patience = limits["wall_seconds"] + limits["cpu_seconds"] + 5
    while inputs:
        reader, writer = os.pipe()
        holder = os.fork()
        if holder == 0:
            try:
                os.close(reader)
                _holder(setup, program, inputs, writer)
            except BaseException as error:
                with contextlib.suppress(OSError):
                    send(writer, {"lost": f"{type(error).__name__}: {error}"})
            finally:
                os._exit(0)
        os.close(writer)
        ready = select.poll()
        ready.register(reader, select.POLLIN)
        alive = True
        while inputs and alive:
            found = None
            if ready.poll(1000 * patience):
                with contextlib.suppress(ValueError, OSError):
                    found = receive(reader)
            if found is None or "lost" in found:
                alive = False
                with contextlib.suppress(ProcessLookupError):
                    os.kill(holder, signal.SIGKILL)
            send(out, found or {"lost": "the test's guard died"})
            inputs = inputs[1:] if found is None or found.get("stage", "+") == "+" else []
        os.close(reader)
        os.waitpid(holder, 0)


def main() -> None:
    setup = json.loads(sys.argv[1])
    test_process.warm_up()
    if setup["library"] is not None:
        _library_by_descriptor(setup["library"])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    if setup["root"] is not None:
        locks.enter_root(setup["root"], setup["binds"], setup["links"], "/box")
    if LINUX:
        locks.hide_memory()
    os.environ.clear()
    sys.argv = [""]
    gc.collect()
    gc.freeze()  # no collection touches, and so copies, what the forks share
    send(1, {"ready": os.getpid()})
    while (program := receive(0)) is not None:
        run_program(setup, program, 1)


def _library_by_descriptor(folder: str) -> None:
    """Let forks that change user import from a library in a folder closed to others."""
    fd = os.open(folder, os.O_RDONLY)
    os.dup2(fd, LIBRARY)
    os.close(fd)
    inside = f"/proc/self/fd/{LIBRARY}"
    sys.path[:] = [path.replace(folder, inside) for path in sys.path]
    for module in list(sys.modules.values()):
        if isinstance(getattr(module, "__path__", None), list):
            module.__path__[:] = [path.replace(folder, inside) for path in module.__path__]
    sys.path_importer_cache.clear()


if __name__ == "__main__":
    main()
