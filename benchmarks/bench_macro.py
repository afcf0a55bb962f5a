"""Segmenting and GAE over macro actions against the token loop that it stands in for.

    python -m benchmarks.bench_macro [--out FILE.json] [--rows 256] [--tokens 512] [--repeats 31]

One thread, no padding. The plain loop is token GAE as PPO codes have it (trlx, DeepSpeed-Chat): T
vectorised steps over a batch, nothing segmented. All are timed in one run, repeats interleaved, so
that a busy machine slows all alike: the ratio of medians is what counts. Exit status 1 if
segmenting and macro-GAE at n = 5 take over half the loop's time.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from marlhf.macro import macro_gae
from marlhf.segment import FixedNgram, Perplexity, RandomNgram, Token, Whole

TARGET = 0.5


def token_gae_loop(rewards, values, gamma=1.0, lam=0.95):
    """Token GAE, one vectorised step a token: advantages and returns [B, T]."""
    columns, last, reversed_advantages = rewards.shape[1], 0.0, []
    for t in reversed(range(columns)):
        following = values[:, t + 1] if t < columns - 1 else 0.0
        delta = rewards[:, t] + gamma * following - values[:, t]
        last = delta + gamma * lam * last
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages, advantages + values


def contenders(rows: int, columns: int) -> dict[str, Callable[[], object]]:
    """name -> what is timed; "loop" is the yardstick."""
    generator = torch.Generator().manual_seed(0)
    rewards, values, losses = torch.randn(3, rows, columns, generator=generator)
    tokens, mask = rewards.long(), torch.ones(rows, columns, dtype=torch.bool)
    ref_logprobs = -losses.abs()

    def whole_way(segmenter):
        def run():
            segments = segmenter(tokens, mask, ref_logprobs=ref_logprobs, generator=generator)
            return macro_gae(rewards, values, segments)

        return run

    segmenters = {
        "FixedNgram(5)": FixedNgram(5),
        "FixedNgram(10)": FixedNgram(10),
        "Token()": Token(),
        "Whole()": Whole(),
        "RandomNgram()": RandomNgram(),
        "Perplexity()": Perplexity(),
        "Perplexity('neighbour')": Perplexity("neighbour"),
    }
    timed = {"loop": lambda: token_gae_loop(rewards, values)}
    return timed | {name: whole_way(each) for name, each in segmenters.items()}


def measure(timed: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, repeats interleaved."""
    seconds = {name: [] for name in timed}
    for repeat in range(repeats + 2):
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            if repeat >= 2:  # two to warm up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256, help="responses")
    parser.add_argument("--tokens", type=int, default=512, help="tokens a response")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    timed = contenders(options.rows, options.tokens)
    # The two must compute the same thing before it is worth asking which is faster.
    for loop, macro in zip(timed["loop"](), timed["Token()"](), strict=True):
        torch.testing.assert_close(macro, loop, rtol=1e-4, atol=1e-4)
    seconds = measure(timed, options.repeats)

    print(f"segments and macro_gae, {options.rows} x {options.tokens} tokens, one thread")
    print(f"{'':24}{'ms':>8}{'/ loop':>8}")
    for name, each in seconds.items():
        label = f"plain loop, {options.tokens} steps" if name == "loop" else name
        print(f"{label:24}{1e3 * each:8.2f}{each / seconds['loop']:8.2f}")
    ratio = seconds["FixedNgram(5)"] / seconds["loop"]
    print(f"FixedNgram(5) at {ratio:.2f} of the plain loop; at most {TARGET} is wanted")

    if options.out:
        table = {
            "rows": options.rows,
            "tokens": options.tokens,
            "repeats": options.repeats,
            "torch": torch.__version__,
            "milliseconds": {name: round(1e3 * each, 4) for name, each in seconds.items()},
            "ratio_to_loop": {
                name: round(each / seconds["loop"], 4) for name, each in seconds.items()
            },
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(table, indent=2) + "\n")
    return int(ratio > TARGET)


if __name__ == "__main__":
    sys.exit(main())
