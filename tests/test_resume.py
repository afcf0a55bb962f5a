"""The whole chain, killed by SIGKILL at random moments, ends bit for bit as if it had not been.

Kills come by the clock, while a stage is at work, and inside a write to the disk, which leaves a
half-written checkpoint, model or manifest behind. What is compared: weights byte for byte, tables
and summaries in full but for what tells the time.
"""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [
    "ppo", "tldr-smoke", "--quiet",
    "sft.steps=12", "sft.checkpoint_every=4", "rm.steps=9", "rm.checkpoint_every=3",
    "ppo.updates=6", "ppo.checkpoint_every=2", "ppo.macro.termination=random",
    "ppo.minibatches=2", "eval.every=3",
]  # fmt: skip
TIMINGS = ("sec", "tokens_per_second", "training_seconds")
SPAWNER = multiprocessing.get_context("forkserver")
SPAWNER.set_forkserver_preload(["torch", "transformers", "marlhf.ppo", "marlhf.supervised"])


def chain(root: str, sync: int | None) -> None:
    """What a process does: the command; SIGKILL comes in its sync-th wait for the disk."""
    os.environ["MARLHF_RUNS"] = root
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    real, left = os.fsync, [sync]

    def fsync(handle):
        if left[0] is not None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        real(handle)

    os.fsync = fsync
    from marlhf.cli import main

    sys.exit(main(COMMAND))


def rows(root: Path, stage: str) -> int:
    tables = list(root.glob(f"{stage}/*/metrics.jsonl"))
    return tables[0].read_bytes().count(b"\n") if tables else 0


def killed(root: Path, when=None, delay: float = 0.0, sync: int | None = None) -> bool:
    """Runs the chain until `when()` and `delay` seconds more, or to its sync-th fsync. -> whether
    it was killed before its end."""
    process = SPAWNER.Process(target=chain, args=(str(root), sync))
    process.start()
    deadline = time.monotonic() + 300
    while process.is_alive() and not (when and when()):
        assert time.monotonic() < deadline, "it neither ends nor gets there"
        time.sleep(0.002)
    if when:
        process.join(delay)
        process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


def timeless(tree):
    """A row or summary without the values that tell the time."""
    if not isinstance(tree, dict):
        return tree
    return {k: timeless(v) for k, v in tree.items() if not k.startswith(TIMINGS)}


def results(root: Path) -> dict:
    """All that the chain left: weights as bytes, tables and summaries without timings."""
    found = {}
    for manifest in sorted(root.glob("*/*/manifest.json")):
        folder = manifest.parent
        name = str(folder.relative_to(root))
        found[name] = timeless(json.loads(manifest.read_text())["summary"])
        for table in folder.glob("*.jsonl"):
            lines = table.read_text().splitlines()
            found[f"{name}/{table.name}"] = [timeless(json.loads(line)) for line in lines]
        for file in [p for p in folder.rglob("*") if p.is_file() and p.parent != folder]:
            found[f"{name}/{file.relative_to(folder)}"] = file.read_bytes()
        assert not list(folder.rglob(".tmp-*"))
        assert not (folder / "checkpoints").exists()
    return found


def check_equal(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    assert [key for key in one if one[key] != two[key]] == []


def unbroken(root: Path) -> dict:
    """The chain by its command line, in a process of its own, never stopped."""
    subprocess.run(
        [sys.executable, "-m", "marlhf", *COMMAND],
        env=os.environ | {"MARLHF_RUNS": str(root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    found = results(root)
    assert {name.split("/")[0] for name in found} == {"sft", "rm", "ppo"}
    assert sum(name.endswith("model.safetensors") for name in found) == 4  # and the critic
    return found


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_bit_for_bit_the_same(tmp_path):
    expected = unbroken(tmp_path / "unbroken")
    root, rng = tmp_path / "killed", random.Random(time.time_ns())
    resumed = 0
    for stage, steps in (("sft", 12), ("rm", 9), ("ppo", 6)):
        row, delay = rng.randint(2, steps - 1), rng.uniform(0, 0.2)
        print(f"killing {stage} {delay:.3f} s after row {row}")
        assert killed(root, lambda s=stage, r=row: rows(root, s) >= r, delay)
        resumed += bool(list(root.glob("*/*/checkpoints/0*")))
        if stage == "rm":
            assert killed(root, sync=rng.randint(2, 12))  # within a checkpoint, most likely
    assert resumed
    assert not killed(root)
    check_equal(results(root), expected)


@pytest.mark.stress
def test_twenty_kills_and_the_same_bits(tmp_path):
    expected = unbroken(tmp_path / "unbroken")
    root, rng = tmp_path / "killed", random.Random(time.time_ns())
    kills = chains = half_written = 0
    while kills < 20:
        chains += 1
        while kills < 20:
            if rng.random() < 0.5:
                dead = killed(root, sync=rng.randint(1, 60))
            else:
                dead = killed(root, when=lambda: True, delay=rng.uniform(0.5, 5))
            half_written += bool(list(root.rglob(".tmp-*")))
            kills += dead
            if not dead:
                break
        assert not killed(root)
        check_equal(results(root), expected)
        root = tmp_path / f"killed{chains}"
    print(f"{kills} kills over {chains} chains, {half_written} left half-written files")
    assert half_written
