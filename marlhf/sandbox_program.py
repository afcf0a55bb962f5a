"""What happens in the process of one test: it is locked in, then compiles and runs the program.
Forked by the guard of `sandbox_worker`; standard library only."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import math
import os
import random
import resource
import sys
import threading
import traceback
import types
import warnings
from typing import Any

from marlhf import sandbox_locks as locks

# What most programs import, and little more: every fork pays for each page that is loaded here.
WARM = (
    "array bisect collections collections.abc copy functools heapq io itertools math operator "
    "queue re string typing"
)
# The names the APPS grader puts before every solution (numpy and fractions aside).
PRELUDE = """
import sys, time, itertools, collections, math, random, heapq, functools, re, string
from itertools import accumulate, product, permutations, combinations
from collections import Counter, OrderedDict, deque, defaultdict, ChainMap
from functools import lru_cache
from math import sqrt, sin, cos, tan, ceil, fabs, floor, gcd, exp, log, log2
from typing import *
from heapq import *
"""
STACK = 64 << 20  # bytes: recursion as deep as competition programs use it
LINUX = sys.platform == "linux"
_prelude: dict[str, Any] = {}


def warm_up() -> None:
    """Load what the forks share."""
    for name in WARM.split():
        importlib.import_module(name)
    exec(PRELUDE, _prelude)
    warnings.simplefilter("ignore")


def _limit(kind: int, soft: int, hard: int | None = None) -> None:
    ceiling = resource.getrlimit(kind)[1]
    wanted = (soft, soft if hard is None else hard)
    if ceiling != resource.RLIM_INFINITY:
        wanted = (min(wanted[0], ceiling), min(wanted[1], ceiling))
    with contextlib.suppress(OSError, ValueError):  # macOS refuses some
        resource.setrlimit(kind, wanted)


def lock_in(setup: dict[str, Any], limits: dict[str, Any]) -> None:
    """Everything that this process may no longer do, before any program code runs in it."""
    seconds = math.ceil(limits["cpu_seconds"])
    _limit(resource.RLIMIT_CPU, seconds, seconds + 1)
    _limit(resource.RLIMIT_FSIZE, limits["file_kib"] << 10)
    _limit(resource.RLIMIT_STACK, STACK)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, 64)
    _limit(resource.RLIMIT_MEMLOCK, 0)
    if LINUX:
        _limit(resource.RLIMIT_MSGQUEUE, 0)
        locks.drop_privileges(setup["uid"])
        locks.die_with_parent()
    elif setup["uid"] is not None:
        os.setgroups([])
        os.setgid(setup["uid"])
        os.setuid(setup["uid"])
    if setup["tasks"] is not None:
        _limit(resource.RLIMIT_NPROC, setup["tasks"] + limits["processes"])
    _limit(resource.RLIMIT_AS, limits["memory_mib"] << 20)
    if LINUX and setup["seccomp"]:
        locks.filter_system_calls()


def _call_function(names: dict[str, Any], function: str, arguments: list[Any]) -> Any:
    """The function of that name, or the method of `class Solution`; as the APPS grader calls it."""
    with contextlib.suppress(Exception):  # JSON has no integer keys
        if isinstance(arguments[0], dict):
            arguments = [{int(k): v for k, v in arguments[0].items()}]
    if "Solution" in names and hasattr(names["Solution"], function):
        return getattr(names["Solution"](), function)(*arguments)
    return names[function](*arguments)


def compiled(source: str, function: str | None) -> types.CodeType:
    """The program's code. One that reads standard input may be the body of a function (`return`,
    `nonlocal` at its top level): the APPS grader puts all of them into one."""
    try:
        return compile(source, "<program>", "exec", dont_inherit=True)
    except SyntaxError as error:
        if function is not None:
            raise
        import ast

        try:
            tree = ast.parse(source)
            wrapper = ast.parse("def code(): pass\ncode()")
            imports = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
            wrapper.body[0].body = [n for n in tree.body if n not in imports]
            wrapper.body[:0] = imports
            return compile(wrapper, "<program>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            raise error from None


def run_test(program: dict[str, Any], given: Any, status: int, result: int) -> int:
    """Compile and run; the exit status. `status` is told that it compiled and closed before."""
    try:
        code = compiled(program["source"], program["function"])
    except BaseException as error:
        os.write(status, ("!" + "".join(traceback.format_exception_only(error)))[:2000].encode())
        return 1
    os.write(status, b"+")
    os.close(status)
    name = "__main__" if program["function"] is None else "program"
    module = types.ModuleType(name)
    module.__dict__.update(_prelude)
    sys.modules[name] = module
    for fd, stream, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        file = open(fd, mode, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        setattr(sys, stream, file)
        setattr(sys, f"__{stream}__", file)
    random.seed(0)  # the same program on the same test gives the same verdict
    code_out = 0
    try:
        exec(code, module.__dict__)
        if program["function"] is not None:
            value = _call_function(module.__dict__, program["function"], given)
            try:
                data = json.dumps(value).encode()
            except (TypeError, ValueError, RecursionError):
                data = b""  # no value that JSON has is one that a test expects
            while data:
                data = data[os.write(result, data) :]
    except SystemExit as error:
        code_out = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        code_out = 1
        line = traceback.format_exception_only(error)[-1].strip()
        os.write(2, f"\n{line[:500]}".encode(errors="replace"))
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        code_out = code_out or 1
    return code_out & 255
