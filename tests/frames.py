"""Made-up frames in the columns that an experiment's `frames()` returns, for tests of tables and
pictures. Scores follow saturating curves, arms differ in speed, chains in level."""

import numpy as np
import pandas as pd

ARMS = {  # key: (label, speed, final true score, KL at the end)
    "token": ("token PPO, λ .95", 1.0, 5.3, 7.4),
    "macro5": ("MA-PPO, n = 5", 1.3, 5.9, 6.1),
    "whole": ("MA-PPO, n = ∞", 1.35, 5.6, 7.3),
    "token_matched": ("token PPO, λ .9898", 1.25, 5.4, 8.3),
    "token_mc": ("token PPO, λ 1", 1.28, 5.7, 7.3),
}


def _rows(generator, chains, updates):
    for arm, (label, speed, true, kl) in ARMS.items():
        for chain in range(chains):
            level = np.random.default_rng(chain).normal(0, 0.06)
            noise = generator.normal(0, 0.04, size=len(updates))
            for update, wobble in zip(updates, noise, strict=True):
                done = 1 - np.exp(-speed * update / 40)
                head = {"arm": arm, "label": label, "chain": chain, "update": int(update)}
                yield head, done, level + wobble, true, kl


def evals(chains=6, last=110, every=10, seed=0):
    generator = np.random.default_rng(seed)
    rows = []
    for head, done, noise, true, kl in _rows(generator, chains, np.arange(0, last + 1, every)):
        rows.append(
            {
                **head,
                "seconds": head["update"] * 0.9 + 0.01 * head["chain"],
                "rm_score": 0.0 + 3.0 * done + noise,
                "true_score": 3.5 + (true - 3.5) * done + noise,
                "kl": kl * done + abs(noise),
                "length": 46 + 12 * done + noise,
                "finished": min(1.0, 0.97 + 0.02 * done),
                "distinct2": 0.62 - 0.1 * done,
                "prompts": 256,
            }
        )
    return pd.DataFrame(rows)


def metrics(chains=6, last=110, seed=1):
    generator = np.random.default_rng(seed)
    rows = []
    for head, done, noise, _true, kl in _rows(generator, chains, np.arange(1, last + 1)):
        n = {"macro5": 11.0, "whole": 1.0}.get(head["arm"], 55.0)
        rms = 0.5 + 0.4 * np.exp(-3 * done) + noise
        rows.append(
            {
                **head,
                "rm_score": 3 * done + noise,
                "true_score": 3.5 + 2 * done,
                "kl": kl * done,
                "length": 46 + 10 * done,
                "finished": 0.97,
                "entropy": 1.2 - 0.5 * done,
                "clip_fraction": 0.0,
                "explained_variance": 0.5 * done,
                "macros": n,
                "adv_rms_token": rms,
                "adv_rms_macro": rms,
                "ret_rms_token": 2 * done + 0.5,
                "ret_rms_macro": 2 * done + 0.5,
                "adv_l2_macro": rms * n**0.5,
                "adv_l2_token": rms * 55**0.5,
                "q_l2_macro": (2 * done + 0.5) * n**0.5,
                "q_l2_token": (2 * done + 0.5) * 55**0.5,
                "seconds": head["update"] * 0.9,
                "tokens_per_second": 4000.0,
                "sec_rollout": 0.3,
                "sec_score": 0.15,
                "sec_update": 0.42,
                "sec_eval": 0.0,
            }
        )
    return pd.DataFrame(rows)


def samples(chains=6, last=110, every=10, prompts=64, seed=2):
    generator = np.random.default_rng(seed)
    rows = []
    for head, done, noise, true, kl in _rows(generator, chains, np.arange(0, last + 1, every)):
        spread = generator.normal(size=(2, prompts))
        for i in range(prompts):
            rows.append(
                {
                    **head,
                    "prompt_id": f"p{i}",
                    "prompt": "POST: a post\nTL;DR:",
                    "response": f" a summary after {head['update']} updates.",
                    "rm_score": 3.0 * done + noise + (1 - 0.4 * done) * spread[0, i],
                    "true_score": 3.5 + (true - 3.5) * done + noise + spread[1, i],
                    "kl": kl * done,
                    "length": 50,
                    "finished": True,
                }
            )
    return pd.DataFrame(rows)


def frames(chains=6, last=110, every=10, prompts=64):
    return {
        "evals": evals(chains, last, every),
        "metrics": metrics(chains, last),
        "samples": samples(chains, last, every, prompts),
        "runs": manifests(chains),
    }


def manifests(chains=6, accuracy=(0.79, 0.83)):
    """SFT and RM rows of an experiment's "runs"; accuracy from the first chain to the last."""
    rows = []
    for chain, share in enumerate(np.linspace(*accuracy, chains)):
        common = {"seed": chain, "minutes": 2.0, "revision": "0" * 40, "device": "a processor"}
        rows.append(
            {
                **common,
                "stage": "sft",
                "summary.true_score": 3.5,
                "summary.best_score": 6.0,
            }
        )
        rows.append(
            {
                **common,
                "stage": "rm",
                "summary.accuracy_after": share,
                "summary.truth_correlation": 0.75,
            }
        )
    return pd.DataFrame(rows)
