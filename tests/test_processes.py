"""The same run on two processes (torchrun, gloo) as on one: rollouts equal, numbers to rounding."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from marlhf import processes

SETTINGS = [
    "tldr-smoke", "--quiet", "sft.steps=4", "rm.steps=3", "sft.micro_batch=2", "rm.micro_batch=2",
    "ppo.updates=2", "ppo.minibatches=2", "ppo.passes=2", "ppo.whiten=true", "ppo.warmup=3",
    "ppo.macro.termination=random", "eval.every=2",
]  # fmt: skip
TOLERANCE = 2e-3  # relative; float32 sums in another order, twelve steps of AdamW


def launch(root, *command, count=2, code=None, **environment):
    """`python -m marlhf` (or `code`) under torchrun; -> exit code, stdout, stderr."""
    script = ["-m", "marlhf"] if code is None else [str(code)]
    process = subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc_per_node", str(count), *script, *command,
        ],
        env=os.environ | {"MARLHF_RUNS": str(root), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=180)
    finally:  # a launcher that hangs leaves no workers behind
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def tables(root):
    """By stage and table; the hash in a run's folder may differ in ppo.micro_batch."""
    found = {}
    for path in sorted(Path(root).glob("*/*/*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[f"{path.parent.parent.name}/{path.name}"] = rows
    return found


def compare(one, two):
    """Every table: text and whole numbers equal, others within the tolerance."""
    assert one.keys() == two.keys()
    assert {name.split("/")[0] for name in one} == {"sft", "rm", "ppo"}
    for name, rows in one.items():
        assert len(rows) == len(two[name]), name
        for left, right in zip(rows, two[name], strict=True):
            for key, value in left.items():
                if "sec" in key or key == "tokens_per_second":
                    continue
                if isinstance(value, float):
                    assert right[key] == pytest.approx(value, rel=TOLERANCE, abs=1e-4), (name, key)
                else:
                    assert right[key] == value, (name, key)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    root = tmp_path_factory.mktemp("alone")
    subprocess.run(
        [sys.executable, "-m", "marlhf", "ppo", *SETTINGS],
        env=os.environ | {"MARLHF_RUNS": str(root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return root


@pytest.mark.slow
def test_two_processes_do_what_one_does(alone, tmp_path):
    code, out, err = launch(tmp_path, "ppo", *SETTINGS, "ppo.micro_batch=2")
    assert code == 0, err[-3000:]
    assert out.count('"training_seconds"') == 1  # one of them prints
    compare(tables(alone), tables(tmp_path))
    manifest = json.loads(next(tmp_path.glob("ppo/*/manifest.json")).read_text())
    assert manifest["processes"] == 2
    assert not list(tmp_path.rglob(".tmp-*"))


FAILS = """
import sys
from marlhf import cli, processes
from marlhf.ppo import PPOTrainer

if sys.argv.pop() == "score":  # a number that is not finite, met by one process alone
    real = PPOTrainer.score

    def score(self, rollout):
        reward = self.reward
        if self.done == 1 and processes.rank() == 1:
            self.reward = lambda *given: reward(*given) * float("nan")
        return real(self, rollout)

    PPOTrainer.score = score
else:  # a defect of one process

    def broken(self, rollout):
        if processes.rank() == 1:
            raise RuntimeError("this process is broken")
        return PPOTrainer.unbroken(self, rollout)

    PPOTrainer.unbroken, PPOTrainer.score = PPOTrainer.score, broken
sys.exit(cli.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, message", [("score", "update 2: the score of prompt"), ("defect", "process is broken")]
)
def test_an_error_of_one_process_ends_all_with_its_message(how, message, alone, tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    updates = 3 if how == "score" else 4  # runs of their own
    options = [f"ppo.updates={updates}", "eval.every=3", "ppo.checkpoint_every=1"]
    code, _, err = launch(alone, "ppo", *SETTINGS, *options, how, code=script)
    assert code != 0 and message in err
    if how == "score":
        assert err.count(message) == 1 and "is kept in" in err
        code, _, err = launch(alone, "ppo", *SETTINGS, *options)  # from what was kept
        assert code == 0, err[-3000:]
        lines = [path.read_text().splitlines() for path in alone.glob("ppo/*/metrics.jsonl")]
        assert [1, 2, 3] in [[json.loads(line)["update"] for line in some] for some in lines]


def test_what_is_dealt_comes_back_in_order(monkeypatch):
    items, shares = list(range(7)), []
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(processes.deal(items))
    assert [len(share) for share in shares] == [3, 2, 2]
    assert processes.undeal(shares) == items
