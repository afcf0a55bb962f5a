"""Programs that try to escape, to cheat or to harm, as data for test_sandbox_hostile.py.

Most get their targets on standard input, as JSON: a file and a process of the test's, ports that it
listens on, and the name of an environment variable. They print "escaped" if they got through, and
"escaped" is what their test expects: a verdict of "passed" is an escape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ERROR, WRONG, TIMEOUT, KILLED = "runtime error", "wrong", "time-out", "killed"
COMPILE = "compile error"
BLOCKED = (ERROR, WRONG)  # refused, and said so


@dataclass(frozen=True)
class Hostile:
    name: str
    source: str
    classes: tuple[str, ...]  # what its tests may be judged
    limits: bool = True  # held by isolation "limits", too
    function: str | None = None
    expected: Any = "escaped"
    repeat: int = 1  # tests of it


_START = "import ctypes, errno, json, os, signal, socket, sys, threading, time\n"
_TARGETS = _START + "target = json.loads(input())\n"
_LIBC = _TARGETS + "libc = ctypes.CDLL(None, use_errno=True)\n"


def _h(name: str, source: str, *classes: str, **more: Any) -> Hostile:
    return Hostile(name, source, classes or BLOCKED, **more)


def _t(name: str, source: str, *classes: str, **more: Any) -> Hostile:
    return _h(name, _TARGETS + source, *classes, **more)


def _c(name: str, source: str, *classes: str, **more: Any) -> Hostile:
    return _h(name, _LIBC + source, *classes, **more)


PROCESSES = [
    _t("fork-bomb", "while True: os.fork()", ERROR, KILLED, TIMEOUT),
    _t(
        "fork-bomb-stubborn",
        "while True:\n try: os.fork()\n except OSError: pass",
        TIMEOUT,
    ),
    _t(
        "thread-bomb",
        "while True: threading.Thread(target=time.sleep, args=(60,)).start()",
        ERROR,
        KILLED,
        TIMEOUT,
    ),
    _t(
        "small-stack-thread-bomb",
        "threading.stack_size(32768)\nn = 0\n"
        "try:\n while n < 1000:\n"
        "  threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); n += 1\n"
        "except RuntimeError: pass\nprint('escaped' if n > 400 else n)",
    ),
    _t("subprocess", "import subprocess\nsubprocess.run([sys.executable, '-c', 'print(1)'])"),
    _t("shell", "os.system('echo escaped')"),
    _t("exec", "os.execv(sys.executable or '/bin/sh', ['sh', '-c', 'echo escaped'])"),
    _t("spawn", "os.posix_spawn('/bin/sh', ['sh', '-c', 'echo escaped'], {})"),
    _t(
        "double-fork-daemon",
        "if os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n"
        "  time.sleep(0.2); os.kill(target['pid'], 9)\n os._exit(0)\nprint('started')",
    ),
    _t("zombies", "for _ in range(2000):\n if os.fork() == 0: os._exit(0)\nprint('escaped')"),
    _t("multiprocessing", "import multiprocessing as m\nm.Process(target=print).start()"),
    _t("stop-itself", "os.kill(os.getpid(), signal.SIGSTOP)", TIMEOUT),
    _t("kill-itself", "os.kill(os.getpid(), signal.SIGKILL)", KILLED),
    _t("abort", "os.abort()", KILLED),
    _t("kill-everyone", "os.kill(-1, signal.SIGKILL)", ERROR, KILLED),
    _t("kill-group-0", "os.kill(0, signal.SIGKILL)", ERROR, KILLED),
    _t("kill-outside", "os.kill(target['pid'], signal.SIGKILL)\nprint('escaped')"),
    _t("signal-outside", "os.kill(target['pid'], 0)\nprint('escaped')"),
    _t(
        "kill-parent", "os.kill(os.getppid(), signal.SIGKILL)\nprint('killed it')", *BLOCKED, KILLED
    ),
    _t("stop-parent", "os.kill(os.getppid(), signal.SIGSTOP)\nprint('stopped it')"),
    _t("kill-process-1", "os.kill(1, signal.SIGKILL)\nprint('killed it')", *BLOCKED, KILLED),
    _t("kill-process-group", "os.killpg(os.getpgid(os.getppid()), 9)", ERROR, KILLED),
    _c("ptrace-parent", "print('escaped' if libc.ptrace(16, os.getppid(), 0, 0) == 0 else 1)"),
    _c("ptrace-outside", "print('escaped' if libc.ptrace(16, target['pid'], 0, 0) == 0 else 1)"),
    _c(
        "read-parent-memory",
        "class V(ctypes.Structure): _fields_ = [('b', ctypes.c_void_p), ('n', ctypes.c_size_t)]\n"
        "b = ctypes.create_string_buffer(8)\nhere = V(ctypes.addressof(b), 8)\n"
        "there = V(id(os), 8)\n"
        "one, two = ctypes.byref(here), ctypes.byref(there)\n"
        "n = libc.process_vm_readv(os.getppid(), one, 1, two, 1, 0)\n"
        "print('escaped' if n > 0 else n)",
    ),
    _t(
        "limits-of-parent",
        "import resource\nresource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))\n"
        "print('escaped')",
    ),
    _t("affinity-of-parent", "os.sched_setaffinity(os.getppid(), {0})\nprint('escaped')"),
    _t("priority-of-others", "os.setpriority(os.PRIO_USER, 0, 19)\nprint('escaped')"),
    _t(
        "raise-limits",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nprint('escaped')",
    ),
    _t("become-root", "os.setuid(0)\nprint('escaped')"),
    _t("still-root", "print('escaped' if 0 in (os.getuid(), os.geteuid()) else 'no')"),
    _t("pidfd", "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)\nprint('sent')"),
]

RESOURCES = [
    _t("memory-at-once", "x = 'x' * 10**10", ERROR),
    _t("memory-bit-by-bit", "x = []\nwhile True: x.append(bytearray(1 << 20))", ERROR, TIMEOUT),
    _t(
        "memory-stubborn",
        "x = []\nwhile True:\n try: x.append(bytearray(1 << 20))\n except MemoryError: pass",
        TIMEOUT,
    ),
    _t("memory-map", "import mmap\nm = mmap.mmap(-1, 1 << 34)\nprint('escaped')"),
    _t(
        "memory-file",
        "n = 0\nfor _ in range(50):\n fd = os.memfd_create('x')\n"
        " for _ in range(64): n += os.write(fd, bytes(1 << 20))\n"
        "print('escaped' if n > 1 << 28 else n)",
    ),
    _c(
        "shared-memory",
        "n = 0\nwhile n < 40:\n i = libc.shmget(0, ctypes.c_size_t(1 << 25), 0o1600)\n"
        " if i < 0: break\n n += 1\nprint('escaped' if n == 40 else n)",
    ),
    _t("disk-one-file", "with open('x', 'wb') as f:\n while True: f.write(bytes(1 << 20))", ERROR),
    _t(
        "disk-many-files",
        "for i in range(400):\n with open(f'x{i}', 'wb') as f: f.write(bytes(60000))\n"
        "print('escaped')",
        limits=False,
    ),
    _t(
        "disk-inodes",
        "for i in range(5000): open(f'x{i}', 'w').close()\nprint('escaped')",
        limits=False,
    ),
    _t(
        "disk-deep-folders",
        "for i in range(3000): os.mkdir('d'); os.chdir('d')\nprint('escaped')",
        limits=False,
    ),
    _t("disk-sparse", "with open('x', 'wb') as f: f.truncate(1 << 40)\nprint('escaped')"),
    _t("descriptors", "x = [os.open('.', 0) for _ in range(1000)]\nprint('escaped')"),
    _t("endless-output", "while True: print('x' * 1000)", KILLED),
    _t("endless-output-raw", "while True: os.write(1, b'escaped')", KILLED),
    _t("endless-errors", "while True: sys.stderr.write('x' * 1000)", KILLED),
    _t("too-much-output", "print('escaped' * 20000)", KILLED),
    _t("loop", "while True: pass", TIMEOUT),
    _t("sleep", "time.sleep(10**6)", TIMEOUT),
    _t("wait-for-input", "while True: sys.stdin.read(); time.sleep(0.01)", TIMEOUT),
    _t("deadlock", "l = threading.Lock(); l.acquire(); l.acquire()", TIMEOUT),
    _t("loop-in-compiled-code", "import re\nre.match('(a+)+$', 'a' * 64 + 'b')", TIMEOUT),
    _t("big-integer", "print(len(str(3 ** 10**7)))", TIMEOUT, ERROR),
    _t("bigger-integer", "x = 7 ** 7 ** 12", TIMEOUT, ERROR),
    _t(
        "ignore-signals",
        "for n in signal.valid_signals():\n try: signal.signal(n, signal.SIG_IGN)\n"
        " except (OSError, ValueError): pass\nwhile True: pass",
        TIMEOUT,
    ),
    _t(
        "block-signals",
        "signal.pthread_sigmask(0, signal.valid_signals())\nwhile True: pass",
        TIMEOUT,
    ),
    _t(
        "catch-everything",
        "while True:\n try:\n  while True: pass\n except BaseException: pass",
        TIMEOUT,
    ),
    _t("deep-recursion", "def f(n): return f(n + 1)\nf(0)", ERROR),
    _t(
        "deeper-recursion",
        "sys.setrecursionlimit(10**9)\nclass A:\n def __repr__(self): return repr([self])\n"
        "repr(A())",
        KILLED,
        ERROR,
        TIMEOUT,
    ),
    _c("null-pointer", "ctypes.string_at(0)", KILLED),
    _c("broken-heap", "libc.free(1234567)", KILLED),
    _t(
        "broken-code-object",
        "f = lambda: 1\nf.__code__ = f.__code__.replace(co_code=bytes([100, 255] * 4))\nf()",
        KILLED,
        ERROR,
    ),
    _t("thread-outlives", "threading.Thread(target=time.sleep, args=(60,)).start()", TIMEOUT),
    _t(
        "daemon-thread-outlives",
        "threading.Thread(target=lambda: time.sleep(1) or print('escaped'), daemon=True).start()",
        WRONG,
    ),
    _h("compile-parentheses", "(" * 10**5 + ")" * 10**5, COMPILE),
    _h("compile-minus", "x = " + "-" * 10**6 + "1", COMPILE),
    _h("compile-null", "print('escaped')\0", COMPILE),
    _h("compile-surrogate", "print('\ud800')", COMPILE),
    _h("compile-encoding", "# coding: nonsense\nprint('escaped' + 1)", COMPILE, ERROR),
    _h("compile-digits", "x = " + "9" * 10**5, COMPILE),
]

FILES = [
    _t("read-etc", "print('escaped' if open('/etc/passwd').read() else '')", limits=False),
    _t("list-etc", "print('escaped' if os.listdir('/etc') else '')", limits=False),
    _t("list-root", "print('escaped' if 'etc' in os.listdir('/') else '')", limits=False),
    _t("up-and-out", "print('escaped' if open('../' * 20 + 'etc/passwd').read() else '')",
       limits=False),
    _t("read-home", "print('escaped' if os.listdir(target['home']) else '')", limits=False),
    _t("read-file", "print('escaped' if open(target['file']).read() else '')", limits=False),
    _t("write-file", "open(target['file'], 'a').write('x')\nprint('escaped')", limits=False),
    _t("remove-file", "os.remove(target['file'])\nprint('escaped')", limits=False),
    _t("symbolic-link-read", "os.symlink(target['file'], 'x')\n"
       "print('escaped' if open('x').read() else '')", limits=False),
    _t("symbolic-link-etc", "os.symlink('/etc', 'x')\nprint('escaped' if os.listdir('x') else '')",
       limits=False),
    _t("hard-link", "os.link(target['file'], 'x')\nprint('escaped')", limits=False),
    _t("rename-out", "open('x', 'w').close()\nos.rename('x', target['file'] + '.x')\n"
       "print('escaped')", limits=False),
    _t("write-elsewhere", "for p in ('/tmp', '/var/tmp', '/dev/shm', '/dev', '/', '/usr', '/root',"
       " '/worker', sys.prefix, os.path.dirname(os.__file__)):\n"
       " try: open(p + '/marlhf-hostile', 'w').close()\n except OSError: continue\n"
       " os.remove(p + '/marlhf-hostile')\n print('escaped'); break", limits=False),
    _t("change-library", "os.chmod(os.__file__, 0o777)\nopen(os.__file__, 'a').write('')\n"
       "print('escaped')"),
    _t("devices", "for p in ('vda', 'sda', 'nvme0n1', 'mem', 'kmsg', 'fuse', 'kvm', 'tty'):\n"
       " try: os.open('/dev/' + p, 0)\n except OSError: continue\n print('escaped'); break",
       limits=False),
    _t("make-device", "os.mknod('d', 0o60600, os.makedev(254, 0))\nos.open('d', 0)\n"
       "print('escaped')"),
    _t("environment", "print('escaped' if target['variable'] in os.environ else '')"),
    _c("environment-in-memory", "libc.getenv.restype = ctypes.c_char_p\n"
       "print('escaped' if libc.getenv(target['variable'].encode()) else '')"),
    _t("environment-of-others", "import glob\nfor p in glob.glob('/proc/[0-9]*/environ'):\n"
       " try: text = open(p).read()\n except OSError: continue\n"
       " if target['variable'] in text: print('escaped'); break", limits=False),
    _t("see-processes", "print('escaped' if str(target['pid']) in os.listdir('/proc') else '')",
       limits=False),
    _t("worker-by-proc", "fd = os.open(f'/proc/{os.getppid()}/fd/1', os.O_WRONLY)\n"
       "os.write(fd, b'x')\nprint('escaped')"),
    _t("memory-by-proc", "open(f'/proc/{os.getppid()}/mem', 'rb')\nprint('escaped')"),
    _t("set-kernel", "open('/proc/sys/kernel/core_pattern', 'a').write('')\nprint('escaped')"),
    _t("system-tree", "print('escaped' if os.listdir('/sys') else '')", limits=False),
]  # fmt: skip

NETWORK = [
    _t("connect", "socket.create_connection(('127.0.0.1', target['port']), 1)\nprint('escaped')"),
    _t("connect-6", "socket.create_connection(('::1', target['port']), 1)\nprint('escaped')"),
    _t("datagram", "s = socket.socket(type=socket.SOCK_DGRAM)\n"
       "s.sendto(b'x', ('127.0.0.1', target['datagram']))\nprint('escaped')"),
    _t("listen", "s = socket.create_server(('127.0.0.1', 0))\nprint('escaped')"),
    _t("abstract-socket", "s = socket.socket(socket.AF_UNIX)\ns.connect(target['socket'])\n"
       "print('escaped')"),
    _t("raw-socket", "socket.socket(type=socket.SOCK_RAW, proto=1)\nprint('escaped')"),
    _t("netlink", "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)\nprint('escaped')"),
    _t("url", "import urllib.request\n"
       "urllib.request.urlopen(f'http://127.0.0.1:{target[\"port\"]}', timeout=1)\n"
       "print('escaped')"),
]  # fmt: skip

KERNEL = [
    _c("mount", "print('escaped' if libc.mount(b'x', b'.', b'tmpfs', 0, None) == 0 else '')"),
    _c("unmount", "print('escaped' if libc.umount2(b'/', 2) == 0 else '')"),
    _c("chroot", "os.chroot('.')\nprint('escaped')"),
    _c("user-namespace", "print('escaped' if libc.unshare(0x10000000) == 0 else '')"),
    _c("network-namespace", "print('escaped' if libc.unshare(0x40000000) == 0 else '')"),
    _c("host-name", "socket.sethostname('x')\nprint('escaped')"),
    _c("clock", "time.clock_settime(time.CLOCK_REALTIME, time.time())\nprint('escaped')"),
    _c("keyring", "print('escaped' if libc.syscall(248 if os.uname().machine == 'x86_64' else 217,"
       " b'user', b'x', b'y', 1, -2) > 0 else '')"),
    _c("io-uring", "p = ctypes.create_string_buffer(256)\n"
       "print('escaped' if libc.syscall(425, 4, p) >= 0 else '')"),
    _c("undo-filter", "print('escaped' if libc.prctl(22, 0, 0, 0, 0) == 0 else '')"),
    _c("new-privileges", "print('escaped' if libc.prctl(38, 0, 0, 0, 0) == 0 else '')"),
    _c("ambient-capability", "print('escaped' if libc.prctl(47, 2, 21, 0, 0) == 0 else '')"),
    _t("type-into-terminal", "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSTI, b'x')\n"
       "print('escaped')"),
]  # fmt: skip

_SECRET = "48151623"

CHEATS = [
    _h("exit-first", "import sys\nsys.exit(0)", WRONG),
    _h("exit-hard-first", "import os\nos._exit(0)", WRONG),
    _h("exit-with-text", "raise SystemExit('escaped')", ERROR),
    _h("close-output", "import os\nos.close(1)\nprint('escaped')", ERROR, WRONG),
    _h("every-answer", "for i in range(1000): print(i)\nprint('escaped')", WRONG),
    _h("answer-then-crash", "print('escaped')\n1 / 0", ERROR),
    _h("answer-then-exit-3", "print('escaped')\nraise SystemExit(3)", ERROR),
    _h("answer-then-hang", "print('escaped', flush=True)\nwhile True: pass", TIMEOUT),
    _h("answer-then-stop", _START + "print('escaped', flush=True)\nos.kill(os.getpid(), 19)",
       TIMEOUT),
    _h("answer-then-die", _START + "print('escaped', flush=True)\nos.kill(os.getpid(), 9)", KILLED),
    _h("answer-then-flood", "print('escaped', flush=True)\nwhile True: print(' ' * 999)", KILLED),
    _h("no-exit", "import os\nos._exit = lambda code: None\nraise ValueError", ERROR, TIMEOUT),
    _h("redefine-print", "import builtins\nbuiltins.print = lambda *a: None\nprint('escaped')",
       WRONG),
    _h("redefine-input", "import builtins\nbuiltins.input = lambda: 'escaped'", WRONG),
    _h("redefine-stdout", "import sys\n"
       "class Out:\n def __eq__(self, o): return True\n def write(self, t): return len(t)\n"
       " def flush(self): pass\n def __contains__(self, o): return True\n"
       "sys.stdout = Out()\nprint('x')", WRONG),
    _h("redefine-judge", "import sys\nfor m in list(sys.modules.values()):\n"
       " for n in list(vars(m)) if hasattr(m, '__dict__') else []:\n"
       "  if n in ('judge', 'same_output', 'same_value'): setattr(m, n, lambda *a: True)\nprint(0)",
       WRONG),
    _h("equal-to-all", "class E:\n def __eq__(self, o): return True\n __hash__ = None\n"
       "def solve(x): return E()", WRONG, function="solve", expected=_SECRET),
    _h("equal-text", "class E(str):\n def __eq__(self, o): return True\n __hash__ = None\n"
       "def solve(x): return E('no')", WRONG, function="solve", expected=_SECRET),
    _h("equal-list", "class E(list):\n def __eq__(self, o): return True\n __hash__ = None\n"
       "def solve(x): return E([1])", WRONG, function="solve", expected=[2]),
    _h("not-a-number", "def solve(x): return float('nan')", WRONG, function="solve", expected=1),
    _h("endless-value", "def solve(x):\n x = []\n x.append(x)\n return x", ERROR, WRONG,
       function="solve"),
    _h("big-value", "def solve(x): return 'escaped' * 10**5", KILLED, function="solve"),
    _h("forge-value", "import os\ndef solve(x):\n os.write(3, b'\"escaped\"')\n return 'no'", WRONG,
       function="solve"),
    _h("redefine-json", "import json\njson.dumps = lambda v: '[1, 2, 3]'\ndef solve(x): return 0",
       WRONG, ERROR, function="solve", expected=_SECRET),
    _h("missing-function", "def other(x): return 'escaped'", ERROR, function="solve"),
    _h("exit-in-function", "import os\ndef solve(x): os._exit(0)", WRONG, function="solve"),
    _h("forge-report", "import json, os, struct\n"
       "r = json.dumps({'code': 0, 'cpu': 0, 'why': '', 'stage': '+', 'out': 'escaped',"
       " 'result': '\"escaped\"', 'err': ''}).encode()\n"
       "for fd in [*range(3, 300), 0]:\n"
       " try: os.write(fd, struct.pack('!I', len(r)) + r)\n except OSError: pass\n"
       "os._exit(0)", WRONG),
    _h("forge-compile-error", "import os\nfor fd in range(3, 300):\n"
       " try: os.write(fd, b'!')\n except OSError: pass\nprint(1)", WRONG),
    _h("read-descriptors", "import os\nfor fd in range(3, 300):\n try: print(os.read(fd, 100))\n"
       " except OSError: pass", WRONG, expected=_SECRET),
    _h("answers-in-stack", "import sys\nf = sys._getframe()\nwhile f:\n"
       " for v in [*f.f_locals.values(), *f.f_globals.values()]:\n"
       f"  if {_SECRET[:4]!r} + {_SECRET[4:]!r} in repr(v): print({_SECRET[:4]!r} + "
       f"{_SECRET[4:]!r}); raise SystemExit\n f = f.f_back", WRONG, ERROR, TIMEOUT,
       expected=_SECRET),
    _h("answers-in-heap", "import gc\nfor o in gc.get_objects():\n"
       f" if isinstance(o, dict) and any(isinstance(v, str) and v == str({_SECRET[:4]}) + "
       f"str({_SECRET[4:]}) for v in list(o.values())): print(str({_SECRET[:4]}) + "
       f"str({_SECRET[4:]})); break", WRONG, ERROR, expected=_SECRET),
    _h("remember-in-file", "import os\nif os.path.exists('seen'): print('escaped')\n"
       "open('seen', 'w').close()", WRONG, repeat=3),
    _h("remember-in-module", "import math\nif hasattr(math, 'seen'): print('escaped')\n"
       "math.seen = True", WRONG, repeat=3),
    _h("remember-outside", "import glob, os, tempfile\n"
       "p = os.path.join('/tmp', 'marlhf-hostile-seen')\n"
       "if os.path.exists(p):\n os.remove(p); print('escaped')\n"
       "else: open(p, 'w').close()", WRONG, ERROR, repeat=2, limits=False),
    _h("not-text", "import os\nos.write(1, bytes(range(128, 256)))", WRONG),
]  # fmt: skip

HOSTILE = [*PROCESSES, *RESOURCES, *FILES, *NETWORK, *KERNEL, *CHEATS]
