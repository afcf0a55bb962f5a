"""Settings: dataclasses, presets as YAML, overrides from the command line or Python.

A preset is a file configs/presets/<task>-<scale>.yaml; `base:` names the preset it starts from.
Everything that a run reads stands in `Config`; what has no line in a preset has the default here.
The paper's own settings are Table 5; the defaults here suit two CPU cores.
"""

# ruff: noqa: RUF009  (option and section return dataclasses.field)
from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type, out of range, or at odds with another."""


def option(default: Any, help: str, **bounds: Any) -> Any:
    """A field with its line of help and its bounds: choices, least, above, most."""
    meta = {"help": help, **bounds}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=meta)
    return field(default=default, metadata=meta)


def section(kind: type, help: str) -> Any:
    return field(default_factory=kind, metadata={"help": help})


@dataclass
class DataConfig:
    task: str = option("tldr", "module of marlhf/tasks that reads the rows")
    source: str = option("embedded", "embedded (generated twin), hub, a hub name, a file or folder")
    revision: str | None = option(None, "revision of a hub data set; null: the one the task pins")
    size: int = option(12000, "posts that the embedded twin generates", least=1)
    seed: int = option(1234, "seed of the split (and of the twin's rows)", least=0)
    split: list[float] = option([0.2, 0.4, 0.4], "shares of the SFT, RM and PPO prompts")
    valid: int = option(256, "held-out prompts, in none of the three parts", least=1)
    prompt_tokens: int = option(96, "longest prompt in tokens; a task may cut its body", least=1)
    response_tokens: int = option(72, "longest response in tokens, end token included", least=1)
    allow_unsafe_programs: bool = option(
        False, "run programs for rows from outside also where the sandbox cannot isolate them"
    )


@dataclass
class TinyConfig:
    arch: str = option("llama", "shape of the model", choices=("llama", "gemma"))
    hidden: int = option(64, "width", least=1)
    layers: int = option(2, "layers", least=1)
    heads: int = option(4, "attention heads; must divide the width", least=1)
    kv_heads: int = option(4, "key-value heads; must divide the heads", least=1)
    ff: int = option(128, "width of the feed-forward layer", least=1)
    vocab: int = option(600, "size of the byte-level BPE trained on the task's text", least=260)


@dataclass
class LoraConfig:
    rank: int = option(0, "rank of the adapters; 0 trains all weights", least=0)
    alpha: float = option(16.0, "scale of the adapters (alpha / rank)", above=0)
    dropout: float = option(0.0, "dropout inside the adapters", least=0, most=0.99)
    targets: str = option("all-linear", "modules that get an adapter (peft's target_modules)")


@dataclass
class ModelConfig:
    name: str = option("tiny", "tiny (from scratch, see model.tiny), a hub name, or a folder")
    tiny: TinyConfig = section(TinyConfig, "shape of the model made from scratch")
    revision: str | None = option(None, "revision of a hub model")
    dtype: str = option("float32", "weights", choices=("float32", "bfloat16", "float16"))
    autocast: str | None = option(
        None, "products, where weights are float32; null: as the weights", choices=("bfloat16",)
    )
    attention: str = option(
        "sdpa", "attention kernel", choices=("sdpa", "eager", "flash_attention_2")
    )
    trust_remote_code: bool = option(False, "run Python code that comes with a hub model")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, slower")
    lora: LoraConfig = section(LoraConfig, "low-rank adapters")


@dataclass
class TrainConfig:
    """What SFT and reward model share (Table 5)."""

    steps: int | None = option(None, "optimizer steps; null: as many as the epochs have", least=1)
    epochs: float = option(1.0, "passes over the rows, where steps is null", above=0)
    batch: int = option(32, "rows (RM: pairs) in an optimizer step", least=1)
    micro_batch: int | None = option(None, "rows in a forward pass; null: the batch", least=1)
    lr: float = option(5e-3, "peak learning rate (AdamW)", above=0)
    warmup: float = option(0.1, "share of the steps in which the rate rises", least=0, most=1)
    schedule: str = option(
        "cosine", "rate after the warm-up", choices=("cosine", "linear", "constant")
    )
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay", least=0)
    max_grad_norm: float = option(1.0, "largest gradient norm", above=0)
    checkpoint_every: int = option(200, "steps between checkpoints", least=1)


@dataclass
class SFTConfig(TrainConfig):
    pass


@dataclass
class RMConfig(TrainConfig):
    norm_samples: int = option(
        256, "SFT samples on which the score is set to mean 0, spread 1", least=2
    )


@dataclass
class SamplingConfig:
    temperature: float = option(0.8, "softmax(logits / temperature)", above=0)
    top_k: int | None = option(None, "sample among the k likeliest tokens; null: all", least=1)
    rows: int | None = option(
        None, "prompts sampled at once by a process; null: all of them", least=1
    )
    compile: bool = option(False, "compile the decoding step: CUDA graphs on a GPU")


@dataclass
class MacroConfig:
    termination: str = option(
        "fixed",
        "where a macro action ends (Sec. 3.2.1); whole is n = infinity",
        choices=("token", "fixed", "random", "perplexity", "parsing", "whole"),
    )
    n: int = option(5, "tokens in a macro action (fixed)", least=1)
    lengths: list[int] = option([2, 3, 5, 10], "lengths to draw from (random)")
    repeats: int = option(3, "times the list of lengths is repeated and shuffled (random)", least=1)
    reading: str = option(
        "cumulative", "which perplexity must not rise", choices=("cumulative", "neighbour")
    )
    parser: str = option(
        "twin",
        "who parses sentences (parsing): the twin's grammar, or stanza (English)",
        choices=("twin", "stanza"),
    )
    cutoff: int = option(5, "a constituent of fewer tokens is a macro action (parsing)", least=2)
    last_alone: bool = option(False, "the last token is a macro action of its own (official code)")
    empty_step: bool = option(
        False,
        "an empty macro step before the last token where those before it are a multiple of n "
        "(official code); needs last_alone",
    )
    value_weights: str = option(
        "equal",
        "sigma, the weights of a macro value (App. D.1)",
        choices=("equal", "unit", "decay", "first"),
    )
    reward_weights: str = option(
        "sum", "how token rewards add up (Eq. 1)", choices=("sum", "discounted", "equal")
    )
    ratio: str = option(
        "token", "clip token ratios or the macro action's (Eq. 4)", choices=("token", "macro")
    )


@dataclass
class PPOConfig:
    updates: int = option(110, "updates, one rollout each", least=1)
    batch: int = option(64, "prompts in a rollout", least=1)
    minibatches: int = option(1, "optimizer steps in a pass over the rollout", least=1)
    passes: int = option(1, "passes over the rollout", least=1)
    micro_batch: int | None = option(None, "rows in a forward pass; null: the minibatch", least=1)
    lr: float = option(3e-4, "learning rate of the policy", above=0)
    critic_lr: float = option(1e-3, "learning rate of the critic", above=0)
    warmup: int = option(0, "updates in which both rates rise", least=0)
    schedule: str = option(
        "constant", "rates after the warm-up", choices=("constant", "linear", "cosine")
    )
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay", least=0)
    max_grad_norm: float = option(1.0, "largest gradient norm, policy and critic apart", above=0)
    kl_coef: float = option(0.05, "beta of the KL reward -beta (log pi - log pi_ref)", least=0)
    clip: float = option(0.2, "range of the probability ratio", above=0)
    value_clip: float = option(0.2, "range of the value around the old one", above=0)
    gamma: float = option(1.0, "discount of a token", above=0, most=1)
    lam: float = option(0.95, "lambda of GAE, a macro action at a time", least=0, most=1)
    whiten: bool = option(False, "advantages to mean 0, spread 1 over the rollout")
    reward: str = option("rm", "reward model, or the task's own score", choices=("rm", "task"))
    reward_clip: float | None = option(
        None, "score clipped to +- this (official code: 2.5); null: never", above=0
    )
    missing_end_penalty: float = option(
        0.0, "taken from the score of a response cut at the limit", least=0
    )
    critic_init: str = option(
        "rm", "weights the critic starts from", choices=("rm", "policy", "zero")
    )
    macro: MacroConfig = section(MacroConfig, "macro actions")
    sampling: SamplingConfig = section(SamplingConfig, "sampling, in training and evaluation")
    checkpoint_every: int = option(20, "updates between checkpoints", least=1)


@dataclass
class EvalConfig:
    every: int = option(10, "updates between evaluations on held-out prompts", least=1)
    prompts: int = option(256, "held-out prompts, the same each time", least=1)
    batch: int = option(256, "held-out prompts sampled at once", least=1)


@dataclass
class RepeatConfig:
    """Samples from finished policies, for best-of-N, pass@k and temperature sweeps."""

    samples: int = option(10, "responses to each held-out prompt at each temperature", least=1)
    temperatures: list[float] = option([], "temperatures; []: that of ppo.sampling")
    prompts: int | None = option(None, "held-out prompts; null: eval.prompts", least=1)
    texts: int = option(4, "prompts whose responses are kept as text", least=0)


@dataclass
class Config:
    name: str = option("", "name of the preset; in the run's folder, not in its identity")
    data: DataConfig = section(DataConfig, "rows, splits, lengths")
    model: ModelConfig = section(ModelConfig, "policy; critic and reward model have its shape")
    sft: SFTConfig = section(SFTConfig, "stage 1: supervised fine-tuning")
    rm: RMConfig = section(RMConfig, "stage 2: reward model")
    ppo: PPOConfig = section(PPOConfig, "stage 3: PPO")
    eval: EvalConfig = section(EvalConfig, "scores on held-out prompts")
    repeat: RepeatConfig = section(RepeatConfig, "repeated samples from finished policies")
    seed: int = option(0, "the chain: seeds SFT, RM and PPO", least=0)


@dataclass(frozen=True)
class Key:
    """A leaf of Config: dotted name, type, default, help and bounds."""

    name: str
    type: Any
    default: Any
    help: str
    bounds: Mapping[str, Any]


def keys(kind: type = Config, prefix: str = "") -> Iterator[Key]:
    """Every leaf under a dataclass, in order of definition."""
    hints = typing.get_type_hints(kind)
    for part in dataclasses.fields(kind):
        name, hint = prefix + part.name, hints[part.name]
        if dataclasses.is_dataclass(hint):
            yield from keys(hint, name + ".")
            continue
        factory = part.default_factory
        default = part.default if factory is dataclasses.MISSING else factory()
        bounds = {k: v for k, v in part.metadata.items() if k != "help"}
        yield Key(name, hint, default, part.metadata["help"], bounds)


KEYS = {key.name: key for key in keys()}


def nearest(name: str, names: Iterable[str]) -> str:
    """' Did you mean a, b?' with the names closest to `name`; what there is where none is close."""
    names = list(names)
    by_leaf = [n for n in names if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    close = list(dict.fromkeys(difflib.get_close_matches(name, names, 3) + by_leaf))[:4]
    if close:
        return f" Did you mean {', '.join(close)}?"
    same = [n for n in names if n.startswith(name.split(".")[0] + ".")]
    listed = same or list(dict.fromkeys(n.split(".")[0] for n in names))
    return f" There are: {', '.join(listed)}." if listed else ""


def wanted(kind: Any) -> str:
    """A field's type in words."""
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    words |= {list[int]: "a list of integers, as [2,3]", list[float]: "a list of numbers, as [0,1]"}
    args = [a for a in typing.get_args(kind) if a is not type(None)]
    if type(None) in typing.get_args(kind):
        return f"{words[args[0]]} or null"
    return words[kind]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, name + ".") if isinstance(value, Mapping) else {name: value}
    return flat


def _parse(text: str) -> dict[str, Any]:
    """`key=value` to {key: value}; text fields are kept as they stand, others read as YAML."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"override {text!r} is not of the form key=value, as ppo.lam=0.99")
    key = KEYS.get(name)
    if key and (key.type is str or (str in typing.get_args(key.type) and value != "null")):
        return {name: value}  # a revision such as 12e4 is no number
    try:
        return {name: OmegaConf.from_dotlist([f"value={value}"])["value"]}
    except (YAMLError, OmegaConfBaseException):
        raise ConfigError(f"{name}: cannot read {value!r} as a value") from None


def _apply(tree: Any, values: Mapping[str, Any], where: str) -> None:
    for name, value in values.items():
        if name not in KEYS:
            if any(k.startswith(name + ".") for k in KEYS):
                raise ConfigError(f"{where}{name} is a section: set one of its keys, not itself.")
            raise ConfigError(f"{where}unknown key {name!r}.{nearest(name, KEYS)}")
        try:
            OmegaConf.update(tree, name, value, merge=False)
        except OmegaConfBaseException:
            raise ConfigError(
                f"{where}{name} must be {wanted(KEYS[name].type)}, not {value!r}"
            ) from None


def presets() -> list[str]:
    """Names of the presets in configs/presets."""
    return sorted(path.stem for path in (CONFIGS / "presets").glob("*.yaml"))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; ConfigError names the file, and the line where YAML does."""
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold a mapping of keys to values")
    return tree


def _preset_layers(preset: str, seen: tuple[str, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """The preset's file and those it starts from, the most basic first."""
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else None
    path = path or CONFIGS / "presets" / f"{preset}.yaml"
    if not path.is_file():
        if not presets():
            raise ConfigError(f"no presets under {CONFIGS}: install with pip install -e .")
        raise ConfigError(f"unknown preset {preset!r}.{nearest(preset, presets())}")
    if preset in seen:
        raise ConfigError(f"preset {preset!r} is its own base: {' -> '.join((*seen, preset))}")
    tree = read_yaml(path)
    base = tree.pop("base", None)
    return [*(_preset_layers(str(base), (*seen, preset)) if base else []), (path, tree)]


def load_config(preset: str, *overrides: str | Mapping[str, Any]) -> Config:
    """The preset (a name, or a path ending in .yaml) with overrides on top, checked.

    An override is "ppo.lam=0.99" or a mapping, {"ppo.lam": 0.99} or {"ppo": {"lam": 0.99}}.
    Raises ConfigError: unknown preset or key (with the nearest names), wrong type, out of range.
    """
    tree = OmegaConf.structured(Config)
    for path, layer in _preset_layers(preset):
        _apply(tree, _flat(layer), f"{path}: ")
    tree.name, model = Path(preset).stem, tree.model.name
    flats = [_parse(each) if isinstance(each, str) else _flat(each) for each in overrides]
    for flat in flats:
        _apply(tree, flat, "")
    if tree.model.name != model and not any("model.revision" in flat for flat in flats):
        tree.model.revision = None  # the preset's commit is of the preset's model
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:  # an interpolation that points nowhere
        raise ConfigError(str(error).splitlines()[0]) from None
    validate(config)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionaries of a config or one of its sections."""
    return dataclasses.asdict(config)


def get(config: Config, name: str) -> Any:
    """The value at a dotted name."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def needs_rm(config: Config) -> bool:
    """Whether PPO reads a reward model: for its scores, or to start the critic from."""
    return config.ppo.reward == "rm" or config.ppo.critic_init == "rm"


def is_variant(config: Config) -> bool:
    """Whether PPO needs marlhf.variants: a parser, or the official code's departures."""
    macro = config.ppo.macro
    return macro.termination == "parsing" or macro.last_alone or macro.empty_step


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _check_bounds(name: str, value: Any, bounds: Mapping[str, Any]) -> None:
    if value is None:
        return
    if isinstance(value, float):
        _check(math.isfinite(value), f"{name} must be a finite number, not {value}")
    choices = bounds.get("choices")
    if choices:
        _check(
            value in choices,
            f"{name}: unknown value {value!r}.{nearest(str(value), choices)}",
        )
    if "least" in bounds:
        _check(value >= bounds["least"], f"{name} must be at least {bounds['least']}, not {value}")
    if "above" in bounds:
        _check(value > bounds["above"], f"{name} must be above {bounds['above']}, not {value}")
    if "most" in bounds:
        _check(value <= bounds["most"], f"{name} must be at most {bounds['most']}, not {value}")


def _divides(config: Config, whole: str, part: str) -> None:
    a, b = get(config, whole), get(config, part)
    _check(b is None or a % b == 0, f"{whole} ({a}) must be a multiple of {part} ({b})")


def validate(config: Config) -> None:
    """Bounds of each field, then what must hold between fields; raises ConfigError."""
    for key in KEYS.values():
        _check_bounds(key.name, get(config, key.name), key.bounds)
    split = config.data.split
    _check(
        len(split) == 3 and all(math.isfinite(s) and 0 <= s <= 1 for s in split) and split[0] > 0,
        f"data.split must be three shares between 0 and 1, the first above 0, not {split}",
    )
    _check(sum(split) <= 1 + 1e-9, f"data.split {split} sums to {sum(split):g}, more than 1")
    _check(
        split[1] > 0 or not needs_rm(config),
        "data.split leaves no rows for the reward model: set ppo.reward=task and "
        "ppo.critic_init=policy, or give the RM a share",
    )
    _check(
        config.eval.prompts <= config.data.valid,
        f"eval.prompts ({config.eval.prompts}) exceeds data.valid ({config.data.valid})",
    )
    _check(
        (config.repeat.prompts or 1) <= config.data.valid,
        f"repeat.prompts ({config.repeat.prompts}) exceeds data.valid ({config.data.valid})",
    )
    temperatures = config.repeat.temperatures
    _check(
        all(math.isfinite(t) and t >= 0 for t in temperatures)
        and len(set(temperatures)) == len(temperatures),
        f"repeat.temperatures must be different numbers of at least 0, not {temperatures}",
    )
    _divides(config, "model.tiny.hidden", "model.tiny.heads")
    _divides(config, "model.tiny.heads", "model.tiny.kv_heads")
    _check(
        (config.model.tiny.hidden // config.model.tiny.heads) % 2 == 0,
        "model.tiny.hidden / model.tiny.heads must be even (rotary positions)",
    )
    for whole, part in (
        ("sft.batch", "sft.micro_batch"),
        ("rm.batch", "rm.micro_batch"),
        ("ppo.batch", "ppo.minibatches"),
    ):
        _divides(config, whole, part)
    rows, micro = config.ppo.batch // config.ppo.minibatches, config.ppo.micro_batch
    _check(
        micro is None or rows % micro == 0,
        f"ppo.batch / ppo.minibatches ({rows}) must be a multiple of ppo.micro_batch ({micro})",
    )
    macro = config.ppo.macro
    _check(
        not macro.empty_step or (macro.last_alone and macro.termination in ("token", "fixed")),
        "ppo.macro.empty_step needs ppo.macro.last_alone=true and termination token or fixed",
    )
    _check(
        macro.termination != "parsing"
        or macro.parser != "twin"
        or config.data.source == "embedded",
        f"ppo.macro.parser=twin has the grammar of generated rows, not of data.source="
        f"{config.data.source}: set ppo.macro.parser=stanza",
    )
    lengths = macro.lengths
    _check(
        len(lengths) > 0 and min(lengths) > 0,
        f"ppo.macro.lengths must hold integers above 0, not {lengths}",
    )
