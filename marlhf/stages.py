"""The stages of a chain, SFT -> reward model -> PPO with one seed, and what each of them reads;
and repeated samples from what they made.

A `Spec` is a run before it is one: its stage, its config, and its identity, which holds only what
can change its numbers. Arms of an experiment differ in their PPO settings, so they share the SFT
and the reward model of their chain, and two arms with equal settings are one run.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlhf import processes
from marlhf.config import Config, ConfigError, is_variant, nearest, needs_rm, to_dict
from marlhf.identity import check_source
from marlhf.runs import Run, atomic_write, run_hash, runs_root, source_hash, versions

if TYPE_CHECKING:
    from marlhf.tasks.base import TaskData

STAGES = ("sft", "rm", "ppo")  # beside them "eval", see `eval_spec`
MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True, eq=False)
class Spec:
    """A run before it is one. `arm` names PPO settings; `given` is the ready model of a run that
    computes nothing."""

    stage: str
    name: str
    config: Config
    identity: dict[str, Any]
    parents: dict[str, Spec] = field(default_factory=dict)
    arm: str = ""
    given: str | None = None

    @functools.cached_property
    def hash(self) -> str:
        return run_hash(self.identity)

    @property
    def title(self) -> str:
        return f"{self.stage}/{self.name}"

    @property
    def folder(self) -> Path:
        """Where the run is, or will be."""
        found = Run.find(self.stage, self.hash)
        return found.path if found else runs_root() / self.stage / f"{self.name}-{self.hash}"

    @property
    def finished(self) -> bool:
        """One that was killed while it tidied up is not: opening it finishes that."""
        found = Run.find(self.stage, self.hash)
        return found is not None and found.finished and not found.leftovers()

    @property
    def run(self) -> Run:
        """The finished run; ValueError if it is not finished."""
        if not self.finished:
            raise ValueError(f"{self.title} has not been run: no finished run in {self.folder}")
        return Run(self.folder)

    def train(self, run: Run) -> None:
        """Computes the run, its parents being finished: from its last checkpoint to its end."""
        if self.given:
            _link_model(self.given, run)
            return
        from marlhf.tasks import get_task

        data = load_data(self.config)
        parents = {key: parent.run.path for key, parent in self.parents.items()}
        run.facts = get_task(self.config.data.task).facts(self.config.data)
        if self.stage == "eval":
            from marlhf.repeated import sample_repeatedly as train
        elif self.stage == "ppo":
            if is_variant(self.config):
                from marlhf.variants import train_variant as train
            else:
                from marlhf.ppo import train_ppo as train

            parents.setdefault("rm", None)
        elif self.stage == "rm":
            from marlhf.supervised import train_rm as train
        else:
            from marlhf.supervised import train_sft as train
        check_source(entry_modules(self.stage, self.config), self.identity["source"])
        train(self.config, data, run, **parents)


def _link_model(name: str, run: Run) -> None:
    """A run whose model is a link to a folder, or to the hub's cache."""
    if processes.main():
        source = _downloaded(name)
        link = run.path / "model"
        link.unlink(missing_ok=True)
        link.symlink_to(source, target_is_directory=True)
    run.finish({})


def _downloaded(name: str) -> Path:
    """A folder as it is; the hub model owner/name, or owner/name@revision, as it was downloaded."""
    source = Path(name)
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        repository, _, revision = name.partition("@")  # no hub name has an @
        try:
            source = Path(snapshot_download(repository, revision=revision or None))
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"no folder and no hub model {name!r}: {reason}") from error
    return source


# What a stage reads


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files)


@functools.lru_cache(maxsize=4)
def _load_data(settings: str, stamp: tuple[tuple[str, int, int], ...]) -> TaskData:
    from marlhf.config import DataConfig
    from marlhf.tasks import get_task

    data = DataConfig(**json.loads(settings))
    return get_task(data.task).load(data)


def _local_source(config: Config) -> Path | None:
    source = config.data.source
    return Path(source) if source not in ("embedded", "hub") and Path(source).exists() else None


def load_data(config: Config) -> TaskData:
    """The task's rows; read once a process, and again when the files change."""
    source = _local_source(config)
    stamp = _stamp(source) if source else ()
    return _load_data(json.dumps(to_dict(config.data)), stamp)


@functools.lru_cache(maxsize=32)
def _hash_files(stamp: tuple[tuple[str, int, int], ...], folder: str) -> str:
    digest = hashlib.sha256()
    for name, _, _ in stamp:
        digest.update(os.path.relpath(name, folder).encode())
        with open(name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def model_fingerprint(name: str, revision: str | None = None) -> str:
    """A folder by its content, wherever it lies; a hub name by name and revision."""
    folder = Path(name)
    if not folder.is_dir():
        return f"hub:{name}@{revision or 'main'}"
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{name}: no model in this folder (no config.json); give a folder written by "
            "save_pretrained, a finished run, or a hub name"
        )
    files = {f for pattern in MODEL_FILES for f in folder.glob(pattern) if f.is_file()}
    stamp = tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in sorted(files))
    return f"folder:{_hash_files(stamp, str(folder))}"


def _sections(stage: str, config: Config) -> dict[str, Any]:
    """The parts of the config that can change the stage's numbers."""
    tree = to_dict(config)
    data, model = tree["data"], tree["model"]
    if _local_source(config):
        data["source"] = "file"  # its content is in the data's fingerprint
    del data["allow_unsafe_programs"]  # where they may run, not what comes of it
    if config.model.autocast is None:  # off is as if there were no such setting
        del model["autocast"]
    if config.model.name != "tiny":
        model["name"] = model_fingerprint(config.model.name, config.model.revision)
        del model["tiny"], model["revision"]
    sampling = tree["ppo"]["sampling"]
    if stage != "ppo" or sampling["rows"] is None:  # the others sample eval.batch at once
        del sampling["rows"]
    if not sampling["compile"]:  # off is as if there were no such setting
        del sampling["compile"]
    kept = {"data": data, "model": model}
    if stage == "eval":
        repeat = tree["repeat"]
        repeat["temperatures"] = repeat["temperatures"] or [sampling["temperature"]]
        repeat["prompts"] = repeat["prompts"] or tree["eval"]["prompts"]
        kept |= {"repeat": repeat, "batch": tree["eval"]["batch"]}
        kept |= {name: sampling[name] for name in ("top_k", "compile") if name in sampling}
        return kept
    if stage == "ppo":
        kept |= {"ppo": tree["ppo"], "eval": tree["eval"]}
        del kept["ppo"]["checkpoint_every"]
        macro = kept["ppo"]["macro"]
        if config.ppo.macro.termination != "parsing":
            del macro["parser"], macro["cutoff"]
        for name in ("last_alone", "empty_step"):  # off is as if there were no such setting
            if not macro[name]:
                del macro[name]
        return kept
    del tree[stage]["checkpoint_every"]
    # Both sample from the SFT model: for its true score, and to standardise the reward model.
    kept |= {stage: tree[stage], "sampling": sampling}
    kept["eval"] = {key: tree["eval"][key] for key in ("prompts", "batch")}
    return kept


def entry_modules(stage: str, config: Config) -> list[str]:
    """The modules whose code, and that of what they import, computes the stage."""
    ppo = "marlhf.variants" if is_variant(config) else "marlhf.ppo"
    trainers = {"ppo": ppo, "eval": "marlhf.repeated"}
    found = [trainers.get(stage, "marlhf.supervised"), f"marlhf.tasks.{config.data.task}"]
    if config.model.autocast:
        found.append("marlhf.placement")
    if config.ppo.sampling.compile:
        found.append("marlhf.compiled")
    return found


def arm_name(config: Config) -> str:
    """What a PPO run's macro actions are: token, macro5, random, perplexity, whole."""
    macro = config.ppo.macro
    return f"macro{macro.n}" if macro.termination == "fixed" else macro.termination


def given_spec(role: str, name: str, config: Config) -> Spec:
    """A ready model in place of a run: a folder, a finished run's folder, or a hub name."""
    folder = Path(name) / "model" if (Path(name) / "manifest.json").is_file() else Path(name)
    source = str(folder.absolute()) if folder.is_dir() else name
    identity = {"stage": "given", "config": {}, "role": role, "model": model_fingerprint(source)}
    return Spec("given", f"{role}-{Path(name).name}", config, identity, given=source)


def stage_spec(
    stage: str,
    config: Config,
    sft: str | None = None,
    rm: str | None = None,
    arm: str | None = None,
) -> Spec:
    """The run of a stage and those it needs, for the chain `config.seed`.

    `sft` and `rm` put a ready model (a folder, a finished run, a hub name) in a stage's place.
    `arm` names the PPO settings in the run's folder, by default after its macro actions.
    Raises ConfigError for an unknown stage, DataError for data that cannot be read.
    """
    if stage not in STAGES:
        raise ConfigError(f"unknown stage {stage!r}.{nearest(stage, STAGES)}")
    parents: dict[str, Spec] = {}
    if stage != "sft":
        parents["sft"] = given_spec("sft", sft, config) if sft else stage_spec("sft", config)
    if stage == "ppo" and needs_rm(config):
        parents["rm"] = given_spec("rm", rm, config) if rm else stage_spec("rm", config, sft)
    data = load_data(config)
    arm = (arm or arm_name(config)) if stage == "ppo" else ""
    identity = {
        "stage": stage,
        "config": _sections(stage, config),
        "seed": config.seed,
        "parents": {key: parent.hash for key, parent in parents.items()},
        "source": source_hash(entry_modules(stage, config)),
        "versions": versions(),
        "data": data.fingerprint,
    }
    name = "-".join(part for part in (config.name, arm, f"c{config.seed}") if part)
    return Spec(stage, name, config, identity, parents, arm)


def eval_spec(ppo: Spec, policy: str = "ppo") -> Spec:
    """Repeated samples (config.repeat) from a PPO run, or with policy="sft" from the SFT model it
    starts from, scored by the chain's reward model and the truth. Arms share that of their SFT."""
    config, sampled = ppo.config, ppo if policy == "ppo" else ppo.parents["sft"]
    parents = {"policy": sampled, **ppo.parents}
    identity = {
        "stage": "eval",
        "config": _sections("eval", config),
        "parents": {key: parent.hash for key, parent in parents.items()},
        "source": source_hash(entry_modules("eval", config)),
        "versions": versions(),
        "data": load_data(config).fingerprint,
    }
    arm = ppo.arm if policy == "ppo" else "sft"
    return Spec("eval", f"{config.name}-{arm}-c{config.seed}", config, identity, parents, arm)


# Running


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """This many threads for torch within, as many as before after."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compute(spec: Spec, threads: int = 1) -> Run:
    """The run alone, its parents being finished; what goes wrong is left in error.txt."""
    with Run.open(spec.stage, spec.name, spec.identity, config=to_dict(spec.config)) as run:
        if not run.finished:
            try:
                with _threads(threads) if not spec.given else contextlib.nullcontext():
                    spec.train(run)
            except Exception:
                atomic_write(run.path / "error.txt", traceback.format_exc())
                raise
            if processes.main():
                (run.path / "error.txt").unlink(missing_ok=True)
    return run


def run_stage(spec: Spec, threads: int = 1) -> Run:
    """The finished run of a spec, in this process, those it needs first; finished ones are found.

    On a CPU the number of threads changes the last bits of sums, hence one unless told otherwise.
    """
    for parent in spec.parents.values():
        run_stage(parent, threads)
    return spec.run if spec.finished else compute(spec, threads)


def with_parents(specs: Iterable[Spec]) -> list[Spec]:
    """The specs and all they need, each once, none before what it needs."""
    order: dict[str, Spec] = {}
    for spec in specs:
        for each in (*with_parents(spec.parents.values()), spec):
            order.setdefault(each.hash, each)
    return list(order.values())
