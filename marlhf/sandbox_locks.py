"""System calls that lock a process in and that the standard library lacks: namespaces, mounts,
capabilities, seccomp. Linux; standard library only, because it runs inside the sandbox."""

from __future__ import annotations

import ctypes
import os
import platform
import struct

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWPID = 0x00020000, 0x08000000, 0x20000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT = 1, 2, 4, 32
_MS_BIND, _MS_REC, _MS_RELATIME = 4096, 16384, 1 << 21
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 36, 38, 47

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _prctl(option: int, *arguments: int) -> None:
    values = [ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4]]
    _call("prctl", option, *values)


def unshare(flags: int) -> None:
    """New namespaces for this process; CLONE_NEWPID is for its children."""
    _call("unshare", flags)


def mount_tmpfs(target: str, options: str) -> None:
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV)
    _call("mount", b"tmpfs", target.encode(), b"tmpfs", flags, options.encode())


def _bind(source: str, target: str) -> None:
    """`source` at `target`, read only. The mount's own flags are kept: a user namespace may not
    clear them."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    flags = ctypes.c_ulong(_MS_BIND | _MS_REC)
    _call("mount", source.encode(), target.encode(), None, flags, None)
    held = os.statvfs(target).f_flag
    keep = held & (2 | 8 | 1024 | 2048) | (_MS_RELATIME if held & 4096 else 0)
    keep |= 0 if source.startswith("/dev/") else _MS_NODEV
    flags = ctypes.c_ulong(_MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | keep)
    _call("mount", None, target.encode(), None, flags, None)


def enter_root(folder: str, binds: list[str], links: dict[str, str], box: str) -> None:
    """Make `folder` a root with nothing in it but `binds`, symbolic `links` and the empty `box`,
    read only, and move into it; what was mounted before is out of reach."""
    mount_tmpfs(folder, "size=1m,mode=755")
    for path in binds:
        _bind(path, folder + path)
    for path, target in links.items():
        os.makedirs(os.path.dirname(folder + path), exist_ok=True)
        os.symlink(target, folder + path)
    os.makedirs(folder + box)
    os.chdir(folder)
    number = 155 if platform.machine() == "x86_64" else 41  # pivot_root has no wrapper in libc
    _call("syscall", ctypes.c_long(number), b".", b".")
    _call("umount2", b".", 2)  # the old root, stacked under the new one; MNT_DETACH
    os.chdir("/")
    flags = ctypes.c_ulong(_MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    _call("mount", None, b"/", None, flags, None)


def die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, 9)


def hide_memory() -> None:
    """No other process without capabilities may trace this one."""
    _prctl(_PR_SET_DUMPABLE, 0)


def adopt_orphans() -> None:
    """Descendants whose parent ends become this process's children."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def unmount(target: str) -> None:
    """Whatever is mounted there, if anything is."""
    _libc.umount2(target.encode(), 2)  # MNT_DETACH


def drop_bounding_set() -> None:
    """No capability is to be gained by exec, by this process and its descendants."""
    for capability in range(64):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError:  # past the last one, or nothing to drop
            break


def drop_privileges(uid: int | None) -> None:
    """The given user (None: stay), no groups, no capabilities, none to be gained by exec."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _prctl(_PR_CAP_AMBIENT, 4)  # clear all
    header = struct.pack("=Ii", 0x20080522, 0)  # version 3
    _call("capset", header, bytes(24))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


# Numbers on x86-64 and on the table that ARM64 and newer architectures share.
_DENIED = {
    # network, processes' memory, what starts a process
    "socket": (41, 198), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    # memory that no limit counts, and memory kept by the kernel
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # namespaces, mounts, and interfaces with a history of holes
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "mount_setattr": (442, 442), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "kexec_load": (246, 104), "init_module": (175, 105),
    "tkill": (200, 130), "pidfd_send_signal": (424, 424), "setpriority": (141, 140),
    "finit_module": (313, 273), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
}  # fmt: skip
_CLONE, _CLONE3 = (56, 220), (435, 435)
# kill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, prlimit64, sched_setaffinity
_OWN = ((62, 129), (234, 131), (129, 138), (297, 240), (302, 261), (203, 122))
_ALLOW, _KILL_PROCESS, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
_CLONE_THREAD = 0x00010000


def _filter() -> tuple[bytes, list[int]] | None:
    """A seccomp program, and the offsets at which the process's own number belongs."""
    try:
        column, audit = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}[platform.machine()]
    except KeyError:
        return None
    program: list[tuple[int, int, int, int]] = []
    own = []

    def add(code: int, k: int, yes: int = 0, no: int = 0) -> None:
        program.append((code, yes, no, k))

    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    add(load, 4)  # architecture
    add(equal, audit, 1, 0)
    add(give, _KILL_PROCESS)
    add(load, 0)  # number of the system call
    if column == 0:
        add(at_least, 0x40000000, 0, 1)  # the x32 table
        add(give, _KILL_PROCESS)
    for numbers in _DENIED.values():
        if numbers[column] is not None:
            add(equal, numbers[column], 0, 1)
            add(give, _EPERM)
    add(equal, _CLONE3[column], 0, 1)
    add(give, _ENOSYS)  # its flags are out of a filter's sight; libc then calls clone
    add(equal, _CLONE[column], 0, 4)
    add(load, 16)  # the first argument's low word
    add(any_bit, _CLONE_THREAD, 0, 1)
    add(give, _ALLOW)
    add(give, _EPERM)
    for numbers in _OWN:  # of or to itself, by 0 or by number
        add(equal, numbers[column], 0, 5)
        add(load, 16)
        add(equal, 0, 1, 0)
        own.append(8 * len(program) + 4)
        add(equal, 0, 0, 1)
        add(give, _ALLOW)
        add(give, _EPERM)
    add(give, _ALLOW)
    return b"".join(struct.pack("=HBBI", *step) for step in program), own


_FILTER = _filter()


def filter_system_calls() -> bool:
    """A seccomp filter: no socket, no new process (threads are none), no trace of or signal to
    another process, nothing that only a container needs. False where it cannot be had: other
    architectures, or a kernel without it."""
    if _FILTER is None:
        return False
    program = ctypes.create_string_buffer(_FILTER[0], len(_FILTER[0]))
    for offset in _FILTER[1]:
        struct.pack_into("=I", program, offset, os.getpid())
    size = len(_FILTER[0]) // 8
    header = ctypes.create_string_buffer(struct.pack("@HP", size, ctypes.addressof(program)))
    try:
        _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(header))
    except OSError:
        return False
    return True
