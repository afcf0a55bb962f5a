"""Experiments: arms of one task over several chains, their tables, and what a scale costs.

configs/experiments/<name>.yaml holds the task, the chains of each scale, the arms with their
settings, and, written down before the runs, the endpoints and the comparisons. An arm is measured
in every chain, so that arms are compared within chains. `repeat` asks for repeated samples from
every arm at its end, and from the SFT models. `scales` has settings of one scale for all arms.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlhf.config import CONFIGS, Config, ConfigError, load_config, nearest, read_yaml
from marlhf.pool import RunFailed, execute, minutes
from marlhf.runs import Run
from marlhf.stages import Spec, eval_spec, load_data, run_stage, stage_spec, with_parents

if TYPE_CHECKING:
    import pandas

__all__ = ["Experiment", "RunFailed", "Spec", "execute", "plan", "run", "run_stage", "stage_spec"]

KEYS = (
    *("title", "task", "presets", "chains", "scales", "arms", "repeat"),
    *("endpoints", "comparisons"),
)
TABLES = ("evals", "metrics", "samples")
QUALITY = (  # of the responses at one temperature, from the summary of a run of repeated samples
    *("rm_score", "true_score", "kl", "length", "finished"),
    *("distinct1", "distinct2", "ref_perplexity"),
)


def run(stage: str, config: Config, sft: str | None = None, rm: str | None = None) -> Run:
    """One stage of one chain, and those it needs, in this process: the same as the command line.

    `import marlhf; run = marlhf.run("ppo", marlhf.load_config("tldr-tiny", "ppo.lam=0.99"))`,
    then `run.frame("evals")`, `run.manifest["summary"]`, and the model under `run.path / "model"`.
    """
    return execute([stage_spec(stage, config, sft, rm)], workers=0)[0]


def evaluate(
    model: str, config: Config, sft: str | None = None, rm: str | None = None
) -> list[dict[str, Any]]:
    """A model's responses to the held-out prompts, a row each with its scores, length and KL to
    the chain's SFT model. `model` is a run's folder or any model with the SFT model's tokenizer;
    the chain's own SFT and reward model are run first unless `sft` and `rm` are given."""
    from marlhf.models import load_policy
    from marlhf.ppo import PPOTrainer
    from marlhf.text import load_tokenizer

    judge = stage_spec("ppo", config, sft, rm)
    parents = dict(zip(judge.parents, execute(list(judge.parents.values()), 0), strict=True))
    folders = {key: run.path / "model" for key, run in parents.items()}
    trainer = PPOTrainer(config, load_data(config), folders["sft"], folders.get("rm"))
    source = Path(model) / "model" if (Path(model) / "manifest.json").is_file() else model
    if load_tokenizer(str(source)).get_vocab() != trainer.tokenizer.get_vocab():
        raise ValueError(f"{model} has another tokenizer than the SFT model: give that with --sft")
    return trainer.evaluator(load_policy(config.model, trainer.tokenizer, source).eval())


def experiments() -> list[str]:
    """Names of the experiments in configs/experiments."""
    return sorted(path.stem for path in (CONFIGS / "experiments").glob("*.yaml"))


@dataclass(frozen=True)
class Experiment:
    """An experiment at a scale. `arms` maps a key to its label, in the order of the file;
    `endpoints` and `comparisons` are as the file has them; `repeated`: whether it has a section
    `repeat`."""

    name: str
    scale: str
    title: str
    task: str
    seeds: tuple[int, ...]
    arms: dict[str, str]
    endpoints: dict[str, Any]
    comparisons: list[tuple[str, str]]
    configs: dict[tuple[str, int], Config] = field(repr=False)
    repeated: bool = False

    @classmethod
    def load(
        cls,
        name: str,
        scale: str = "tiny",
        overrides: Sequence[str] = (),
        seeds: Sequence[int] | None = None,
    ) -> Experiment:
        """Reads configs/experiments/<name>.yaml. `overrides` are put on top of every arm; `seeds`
        replace the chains 0, 1, ... (pilots). Raises ConfigError, which names the file and key."""
        path = CONFIGS / "experiments" / f"{name}.yaml"
        if not path.is_file():
            raise ConfigError(f"unknown experiment {name!r}.{nearest(name, experiments())}")
        tree = read_yaml(path)
        for key in tree:
            if key not in KEYS:
                raise ConfigError(f"{path}: unknown key {key!r}.{nearest(str(key), KEYS)}")
        for key in ("task", "chains", "arms"):
            if not tree.get(key):
                raise ConfigError(f"{path}: {key} is missing")
        if scale not in tree["chains"]:
            raise ConfigError(f"{path}: no scale {scale!r}.{nearest(scale, tree['chains'])}")
        chains = tuple(range(tree["chains"][scale]) if seeds is None else seeds)
        preset = tree.get("presets", {}).get(scale, f"{tree['task']}-{scale}")
        labels, configs = {}, {}
        repeat = {"repeat": tree["repeat"]} if "repeat" in tree else {}
        for key in tree.get("scales", {}):
            if key not in tree["chains"]:
                raise ConfigError(f"{path}, scales: no {key!r}.{nearest(key, tree['chains'])}")
        sizes = tree.get("scales", {}).get(scale, {})
        for arm, settings in tree["arms"].items():
            settings = dict(settings or {})
            labels[arm] = str(settings.pop("label", arm))
            for seed in chains:
                try:
                    configs[arm, seed] = load_config(
                        preset, repeat, sizes, settings, *overrides, {"seed": seed}
                    )
                except ConfigError as error:
                    raise ConfigError(f"{path}, arm {arm}: {error}") from None
        comparisons = [tuple(pair) for pair in tree.get("comparisons", [])]
        for pair in comparisons:
            for arm in pair:
                if arm not in labels:
                    raise ConfigError(f"{path}, comparisons: no arm {arm!r}.{nearest(arm, labels)}")
        title, endpoints = tree.get("title", name), tree.get("endpoints", {})
        task, again = str(tree["task"]), bool(repeat)
        return cls(name, scale, title, task, chains, labels, endpoints, comparisons, configs, again)

    def arm_specs(self) -> dict[tuple[str, int], Spec]:
        """The PPO run of each arm and chain, chain by chain; equal settings give equal hashes."""
        return {
            (arm, seed): stage_spec("ppo", self.configs[arm, seed], arm=arm)
            for seed in self.seeds
            for arm in self.arms
        }

    def eval_specs(self) -> dict[tuple[str, int], Spec]:
        """The repeated samples of each arm and chain; none without a section `repeat`.

        Those of the first arm's SFT model stand under "sft"; where another arm has another SFT
        model, of another size perhaps, under "sft_<arm>", named after the first arm that has it.
        """
        if not self.repeated:
            return {}
        found, seen = {}, set()
        for (arm, seed), spec in self.arm_specs().items():
            sft = spec.parents["sft"].hash
            if sft not in seen:
                found["sft" if ("sft", seed) not in found else f"sft_{arm}", seed] = eval_spec(
                    spec, "sft"
                )
            seen.add(sft)
            found[arm, seed] = eval_spec(spec)
        return found

    def labels(self) -> dict[str, str]:
        """{key: label} of the arms and of what `eval_specs` calls their SFT models."""
        sft = {f"sft_{arm}": f"SFT of {label}" for arm, label in self.arms.items()}
        return {"sft": "SFT", **sft, **self.arms}

    def specs(self) -> list[Spec]:
        """Every run, SFT and reward models included, none before what it needs."""
        return with_parents([*self.arm_specs().values(), *self.eval_specs().values()])

    def run(self, workers: int | None = None, progress: bool = True) -> Experiment:
        """Runs what is not finished yet (see `execute`)."""
        execute(self.specs(), workers, progress)
        return self

    def frames(self, tables: Sequence[str] = TABLES) -> dict[str, pandas.DataFrame]:
        """The tables of all PPO runs, with arm, label and chain in front; where the experiment asks
        for repeated samples, "repeated" and "quality", a row an arm, chain and temperature with
        scores, KL, length, diversity and perplexity under the reference; and "runs", a row of the
        manifest for each run. ValueError names a run that is not finished."""
        import pandas

        specs, evals, labels = self.arm_specs(), self.eval_specs(), self.labels()
        sources = dict.fromkeys(tables, specs) | ({"repeated": evals} if evals else {})
        frames = {}
        for table, runs in sources.items():
            parts = []
            for (arm, seed), spec in runs.items():
                frame = spec.run.frame(table)
                frame.insert(0, "chain", seed)
                frame.insert(0, "label", labels[arm])
                frame.insert(0, "arm", arm)
                parts.append(frame)
            frames[table] = pandas.concat(parts, ignore_index=True)
        if evals:
            frames["quality"] = pandas.DataFrame([
                {"arm": arm, "label": labels[arm], "chain": seed, **row}
                for (arm, seed), spec in evals.items()
                for row in _quality_rows(spec)
            ]).astype(dict.fromkeys(QUALITY, float))  # fmt: skip
        rows, owners = [], [*specs.items(), *evals.items()]
        for spec in with_parents(s for _, s in owners):
            arms = [arm for (arm, _), s in owners if s.hash == spec.hash]
            rows.append({"arm": " ".join(arms), **_manifest_row(spec)})
        frames["runs"] = pandas.DataFrame(rows)
        return frames


def _quality_rows(spec: Spec) -> list[dict[str, Any]]:
    """A row a temperature, from the summary: all texts were counted there, few are kept."""
    summary = spec.run.manifest["summary"]["temperatures"]
    return [
        {"temperature": float(temperature), **{name: means[name] for name in QUALITY}}
        for temperature, means in summary.items()
    ]


def _manifest_row(spec: Spec) -> dict[str, Any]:
    """A run's manifest in one row; config and versions as JSON."""
    manifest = spec.run.manifest
    git = manifest.get("git", {})
    plain = ("stage", "name", "hash", "seed", "data", "device", "threads", "peak_rss_mib")
    return {
        **{key: manifest[key] for key in plain},
        "source": manifest["identity"].get("source"),
        "minutes": manifest["wall_seconds"] / 60,
        "parents": " ".join(parent.hash for parent in spec.parents.values()),
        "revision": git.get("revision"),
        "dirty": git.get("dirty"),
        "versions": json.dumps(manifest["versions"]),
        "config": json.dumps(manifest["config"]),
        **{f"summary.{key}": value for key, value in _leaves(manifest["summary"])},
    }


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves = []
    for key, value in tree.items():
        inside = isinstance(value, dict)
        leaves += _leaves(value, f"{prefix}{key}.") if inside else [(prefix + key, value)]
    return leaves


def plan(scale: str = "tiny", names: Sequence[str] | None = None) -> pandas.DataFrame:
    """The ledger of a scale: a row for each experiment, stage and arm with its runs, how many of
    them are done, and minutes, measured where they are done and by configs/ledger.yaml elsewhere
    (null where neither is known). A run that several experiments share stands with the first."""
    import pandas

    seen: set[str] = set()
    rows = []
    for name in names or experiments():
        if scale not in read_yaml(CONFIGS / "experiments" / f"{name}.yaml").get("chains", {}):
            continue
        for spec in Experiment.load(name, scale).specs():
            if spec.hash in seen:
                continue
            seen.add(spec.hash)
            done = spec.finished
            cost = spec.run.manifest["wall_seconds"] / 60 if done else minutes(spec)
            left = 0.0 if done else cost
            row = {"experiment": name, "stage": spec.stage, "arm": spec.arm, "runs": 1}
            rows.append({**row, "done": int(done), "minutes": cost, "left": left})
    if not rows:
        raise ConfigError(f"no experiment has the scale {scale!r}")
    frame = pandas.DataFrame(rows).astype({"minutes": float, "left": float})
    groups = frame.groupby(["experiment", "stage", "arm"], sort=False)
    sums = groups[["runs", "done"]].sum()
    costs = (
        groups[["minutes", "left"]]
        .sum(min_count=1)
        .where(groups[["minutes", "left"]].count().eq(groups.size(), axis=0))
    )
    return sums.join(costs).reset_index()
