"""One PPO update of marlhf against one of TRL 1.9.2's PPOTrainer, and against the arithmetic.

    python -m benchmarks.bench_update [--trl PYTHON] [--rounds 9] [--out FILE.json]

Both trainers do the same work at `SIZES`: float32, random weights, no stop token, one thread each
on the same core. TRL runs in its own environment as a second process (`trl_update.py`). The two
take turns, one update each, so that a machine that slows down slows both; the one whose turn it is
not waits on a pipe. Whole updates are timed, not the start. README.md says what is in an update.
Exit status 1 if the target is missed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.update(THREADS)  # before torch is imported; the second process inherits them

import torch  # noqa: E402

HERE = Path(__file__).resolve().parent
TRL_PYTHON = HERE / ".venv-trl" / "bin" / "python"
SIZES = {
    "vocab": 600, "hidden": 64, "ff": 256, "layers": 2, "heads": 4,  # a Gemma shape
    "prompt": 67, "response": 55, "batch": 64, "temperature": 0.8,
}  # fmt: skip
TARGET = 0.45  # ours over TRL's, at most
WARMUP = 2


class Trl:
    """TRL's trainer in its own environment, driven over a pipe (the protocol: trl_update.py)."""

    def __init__(self, python: Path, sizes: dict):
        if not python.is_file():
            raise SystemExit(
                f"{python}: no such file; `make bench` makes TRL's environment there from "
                "benchmarks/requirements-trl.txt (or give --trl PYTHON)"
            )
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [python, HERE / "trl_update.py", json.dumps(sizes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.read()  # "ready"

    def read(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise SystemExit(f"TRL's process ended:\n{self.errors.read()[-3000:]}")
        return line

    def update(self) -> dict:
        """-> wall, cpu and gc (Python's garbage collector, part of both) seconds of one update."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return json.loads(self.read())

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def random_models(folder: Path) -> tuple[Path, Path]:
    """Policy and reward model with random weights and their tokenizer, saved as users' would be.

    A token is a word, so that the reward model reads as many tokens as the policy wrote.
    """
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from marlhf.config import ModelConfig, TinyConfig
    from marlhf.models import load_policy, load_scalar, save_model

    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(SIZES["vocab"] - 2))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"
    )
    shape = {name: SIZES[name] for name in ("hidden", "layers", "heads", "ff", "vocab")}
    config = ModelConfig(tiny=TinyConfig(arch="gemma", kv_heads=SIZES["heads"], **shape))
    save_model(load_policy(config, tokenizer), tokenizer, folder / "policy")
    reward_model = load_scalar(config, tokenizer, folder / "policy")
    save_model(reward_model, tokenizer, folder / "reward-model")
    return folder / "policy", folder / "reward-model"


def our_trainer(folder: Path):
    """marlhf's PPOTrainer for MA-PPO, n = 5, on random prompts; the end token is never met."""
    from marlhf.config import load_config
    from marlhf.ppo import PPOTrainer
    from marlhf.tasks.base import TaskData
    from marlhf.text import Example, Prompt

    policy, reward_model = random_models(folder)
    settings = {
        "data.task": "pairs",  # prompts without a hidden true score
        "data.prompt_tokens": SIZES["prompt"],
        "data.response_tokens": SIZES["response"],
        "model.name": str(policy),
        "ppo.batch": SIZES["batch"],
        "ppo.minibatches": 1,
        "ppo.passes": 1,
        "ppo.micro_batch": None,
        "ppo.macro.termination": "fixed",
        "ppo.macro.n": 5,
        "ppo.sampling.temperature": SIZES["temperature"],
    }
    numbers = torch.randint(SIZES["vocab"] - 2, (4 * SIZES["batch"], SIZES["prompt"])).tolist()
    prompts = [Prompt("", " ".join(f"w{n}" for n in row), "") for row in numbers]
    examples = [Example(str(i), prompt, "", {}) for i, prompt in enumerate(prompts)]
    data = TaskData(
        sft=[], rm=[], ppo=examples, valid=[], valid_pairs=[], dropped={}, fingerprint=""
    )
    trainer = PPOTrainer(load_config("pairs-small", settings), data, policy, reward_model)
    trainer.tokenizer.eos_token = None  # the sampler stops at nothing
    return trainer


class Ours:
    """marlhf's trainer at the same sizes, update after update, metrics included."""

    def __init__(self):
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            self.trainer = our_trainer(Path(folder))
        self.updates = 0

    def update(self) -> dict:
        """-> wall and cpu seconds of one update, and of its parts (sec_*, wall)."""
        wall, cpu = time.perf_counter(), time.process_time()
        row = self.trainer.one_update(self.updates)
        took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        self.updates += 1
        if row["length"] != SIZES["response"]:
            raise SystemExit(f"responses of {row['length']} tokens instead of {SIZES['response']}")
        return took | {name: value for name, value in row.items() if name.startswith("sec_")}


def flops(sizes: dict) -> dict[str, float]:
    """Floating-point operations of the products that one update cannot do without, by part.

    A product of [m, k] and [k, n] counts 2 m k n. A layer has 4 d^2 + 3 d ff weights, the head d V;
    attention takes 4 d for each pair of a token and one not after it. Heads are applied only where
    a response token is predicted, sampling keeps its keys and values, the backward pass counts
    twice the forward one. Softmax, norms, rotations and the optimizer are not counted.
    """
    d, layers, batch = sizes["hidden"], sizes["layers"], sizes["batch"]
    prompt, length = sizes["prompt"], sizes["response"]
    read = prompt + length - 1  # the last token is predicted, but only the reward model reads it
    token = 2 * layers * (4 * d * d + 3 * d * sizes["ff"])
    head = 2 * d * sizes["vocab"]

    def body(tokens):
        return tokens * token + 2 * d * layers * tokens * (tokens + 1)

    policy = body(read) + length * head
    row = {
        "sampling, prompts": body(prompt) + head,
        "sampling, token by token": body(read) - body(prompt) + (length - 1) * head,
        "reference, forward": policy,
        "reward model, forward": body(read + 1) + 2 * d,
        "policy, forward and backward": 3 * policy,
        "critic, forward and backward": 3 * (body(read) + length * 2 * d),
    }
    return {part: batch * count for part, count in row.items()}


def product_rate(repeats: int = 10) -> float:
    """Operations a second of float32 products [B (P + T - 1), d] x [d, ff], as an update has them.

    Sampling's own products, of [B, d], run at the same rate or a little faster.
    """
    rows = SIZES["batch"] * (SIZES["prompt"] + SIZES["response"] - 1)
    left = torch.rand(rows, SIZES["hidden"])
    right = torch.rand(SIZES["hidden"], SIZES["ff"])
    out = torch.empty(rows, SIZES["ff"])
    torch.mm(left, right, out=out)
    start = time.perf_counter()
    for _ in range(repeats):
        torch.mm(left, right, out=out)
    return 2 * rows * SIZES["hidden"] * SIZES["ff"] * repeats / (time.perf_counter() - start)


def measure(trl_python: Path, rounds: int) -> dict:
    """TRL and ours in turn, `rounds` updates each after `WARMUP`; the product rate beside them."""
    ours = Ours()
    for _ in range(WARMUP):
        ours.update()
    trl = Trl(trl_python, {**SIZES, "warmup": WARMUP})
    rows = {"trl": [], "ours": [], "rate": []}
    for _ in range(rounds):
        rows["trl"].append(trl.update())
        rows["ours"].append(ours.update())
        rows["rate"].append(product_rate())
    trl.close()
    return rows


def median(rows: list[dict], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def summarise(rows: dict) -> dict:
    """Medians, the ratio pair by pair, and the seconds the arithmetic alone would take."""
    counts = flops(SIZES)
    rate = statistics.median(rows["rate"])
    ours, trl = median(rows["ours"], "wall"), median(rows["trl"], "wall")
    arithmetic = sum(counts.values()) / rate
    pairs = list(zip(rows["ours"], rows["trl"], strict=True))
    return {
        "seconds": {"trl": trl, "ours": ours},
        "cpu_seconds": {"trl": median(rows["trl"], "cpu"), "ours": median(rows["ours"], "cpu")},
        "trl_garbage_collection": median(rows["trl"], "gc"),
        "ratio": statistics.median(a["wall"] / b["wall"] for a, b in pairs),
        "ratio_cpu": statistics.median(a["cpu"] / b["cpu"] for a, b in pairs),
        "ratio_without_gc": statistics.median(a["wall"] / (b["wall"] - b["gc"]) for a, b in pairs),
        "parts": {part: median(rows["ours"], part) for part in rows["ours"][0] if "sec_" in part},
        "gflop": {part: count / 1e9 for part, count in counts.items()},
        "gflop_per_second": rate / 1e9,
        "arithmetic_seconds": arithmetic,
        "times_arithmetic": ours / arithmetic,
    }


def spread(values) -> str:
    values = sorted(values)
    return f"{statistics.median(values):8.3f}   ({values[0]:.3f} - {values[-1]:.3f})"


def report(rows: dict, result: dict) -> str:
    """The table for the terminal."""
    lines = [f"one PPO update, seconds: median (least - most) of {len(rows['trl'])}, one thread"]
    for name, label in (("trl", "TRL 1.9.2"), ("ours", "marlhf")):
        lines.append(f"  {label:<32}{spread(row['wall'] for row in rows[name])}")
    verdict = "met" if result["ratio"] <= TARGET else "MISSED"
    lines += [
        f"  {'marlhf / TRL':<32}{result['ratio']:8.3f}   at most {TARGET}: {verdict}",
        f"  {'  by processor time':<32}{result['ratio_cpu']:8.3f}",
        f"  {'  TRL without its gc.collect()':<32}{result['ratio_without_gc']:8.3f}"
        f"   ({result['trl_garbage_collection']:.3f} s of TRL's update)",
        "marlhf by part, seconds",
        *(f"  {part:<32}{value:8.3f}" for part, value in result["parts"].items()),
        "the arithmetic, GFLOP",
        *(f"  {part:<32}{value:8.2f}" for part, value in result["gflop"].items()),
    ]
    lines += [
        f"  {'in all':<32}{sum(result['gflop'].values()):8.2f}",
        f"  {'measured rate, GFLOP/s':<32}{result['gflop_per_second']:8.1f}",
        f"  {'seconds at that rate':<32}{result['arithmetic_seconds']:8.3f}",
        f"  {'marlhf / arithmetic':<32}{result['times_arithmetic']:8.2f}",
    ]
    return "\n".join(lines)


def one_core() -> None:
    """This process, and the one it starts, on one core and one thread each."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def main() -> int:
    """Measures, prints, writes; -> exit status, 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", type=Path, default=TRL_PYTHON, help="python of TRL's environment")
    parser.add_argument("--rounds", type=int, default=9, help="updates of each (default 9)")
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    options = parser.parse_args()
    one_core()
    rows = measure(options.trl, options.rounds)
    result = summarise(rows)
    print(report(rows, result))
    if options.out:
        everything = {"sizes": SIZES, "torch": torch.__version__, **result, "rounds": rows}
        options.out.write_text(json.dumps(everything, indent=1) + "\n")
    return int(result["ratio"] > TARGET)


if __name__ == "__main__":
    sys.exit(main())
