"""What a preset asks of a machine: memory by part, batches, hours; and whether it fits at all."""

from __future__ import annotations

import os
from collections.abc import Sequence

from omegaconf import OmegaConf

from marlhf import processes
from marlhf.config import Config, ConfigError, needs_rm

SAVING = ("model.gradient_checkpointing=true", "ppo.micro_batch=1")
LORA = ("model.lora.rank=64", "model.dtype=bfloat16", "model.gradient_checkpointing=true")
SEVERAL = 8  # processes of the last proposal: GPUs of a node


def changed(config: Config, settings: Sequence[str]) -> Config:
    """The config with some settings of the form key=value."""
    tree = OmegaConf.merge(OmegaConf.structured(config), OmegaConf.from_dotlist(list(settings)))
    return OmegaConf.to_object(tree)


def preset_plan(config: Config) -> str:
    """The text of `marlhf plan PRESET`."""
    from marlhf.memory import GIB, PARTS, estimate

    variants = [("as the preset says", config, 1, False)]
    several = config.model.name != "tiny" and config.ppo.batch % SEVERAL == 0
    if several and not config.model.lora.rank:
        variants.append((f"in shares on {SEVERAL} GPUs (FSDP), each", config, SEVERAL, True))
    last = config
    if config.model.name != "tiny" and not config.model.lora.rank:
        last = changed(config, LORA)
        variants.append((" ".join(LORA), last, 1, False))
    if several:
        variants.append((f"the same on {SEVERAL} GPUs (DDP), each", last, SEVERAL, False))
    lines = []
    for title, each, count, shares in variants:
        found = estimate(each, count, shares)
        if not lines:
            unit, name = (GIB, "GiB") if found.peak > GIB else (2**20, "MiB")
            lines += [
                f"{config.name}: {config.model.name}, {found.parameters:,} parameters; policy, "
                f"critic, reference{' and reward model' if config.ppo.reward == 'rm' else ''}",
                "",
                name.ljust(16) + "".join(part.rjust(17) for part in (*PARTS, "total")),
            ]
        lines.append(f"{title}; {found.trained:,} trained")
        for when, parts in (("  update", found.update), ("  sampling", found.sampling)):
            sizes = [*(parts[part] for part in PARTS), sum(parts.values())]
            lines.append(when.ljust(16) + "".join(f"{size / unit:17.2f}" for size in sizes))
    return "\n".join([*lines, "", *_batches(config), "", _hours(config)])


def _batches(config: Config) -> list[str]:
    lines = ["batches (one process)"]
    stages = [("SFT", config.sft, "rows"), ("RM", config.rm, "pairs")]
    for name, stage, what in stages if needs_rm(config) else stages[:1]:
        micro = stage.micro_batch or stage.batch
        length = f"{stage.steps} steps" if stage.steps else f"{stage.epochs:g} epochs"
        lines.append(
            f"  {name:4} {stage.batch} {what} a step = {stage.batch // micro} micro-batches of "
            f"{micro}; {length}"
        )
    ppo, data = config.ppo, config.data
    rows = ppo.batch // ppo.minibatches
    micro = ppo.micro_batch or rows
    lines += [
        f"  PPO  {ppo.batch} prompts an update = {ppo.minibatches} minibatches of "
        f"{rows // micro} micro-batches of {micro}, {ppo.passes} times over",
        f"       {ppo.updates} updates: {ppo.updates * ppo.batch:,} responses of at most "
        f"{data.response_tokens} tokens to prompts of at most {data.prompt_tokens}",
        f"       {min(ppo.sampling.rows or ppo.batch, ppo.batch)} prompts sampled at once, "
        f"{config.eval.batch} in an evaluation",
    ]
    return lines


def _hours(config: Config) -> str:
    from marlhf.pool import ledger

    minutes = ledger()["minutes"].get(config.name, {})
    stages = ["sft", *(["rm"] if needs_rm(config) else []), "ppo"]
    if not all(stage in minutes for stage in stages):
        return "hours: not measured for this preset (configs/ledger.yaml holds what was)"
    total = sum(minutes[stage] for stage in stages)
    parts = ", ".join(f"{stage} {minutes[stage]:g}" for stage in stages)
    return f"hours: {total / 60:.2f} for a chain (minutes: {parts}), on {ledger()['machine']}"


# Before loading


def device_memory() -> tuple[int, str]:
    """Bytes of one GPU, or else of the machine, and what it is."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1], "GPU"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "machine"


def fewer_rows(
    config: Config, count: int, limit: int, shares: bool = False
) -> tuple[str, ...] | None:
    """Settings with which the keys and values of prompts sampled at once fit beside the rest on
    each of `count` processes; () where all fits as it is, None where the rest does not."""
    from marlhf.memory import estimate, rows_at_once

    found = estimate(config, count, shares)
    if found.peak <= limit:
        return ()
    rows = fits = rows_at_once(config, count)
    cache = "key-value cache"
    for parts, grow in ((found.update, (cache,)), (found.sampling, (cache, "activations"))):
        growing = sum(parts[part] for part in grow)
        room = limit - sum(parts.values()) + growing
        if room < 0:
            return None
        if growing:
            fits = min(fits, int(room / growing * rows))
    if fits < 1:
        return None
    fits = 2 ** (fits.bit_length() - 1)
    each = config.ppo.batch // count > fits, min(config.eval.batch, config.eval.prompts) > fits
    names = ("ppo.sampling.rows", "eval.batch")
    return tuple(f"{name}={fits}" for name, much in zip(names, each, strict=True) if much)


def require_fit(config: Config, memory: int | None = None) -> None:
    """Raises ConfigError where PPO of a model that is not tiny cannot fit a process' device, with
    the settings that would; passes where the model's shape is not known."""
    from marlhf.memory import (
        GIB,
        cache_bytes,
        estimate,
        model_shape,
        parameters_of,
        rows_at_once,
    )
    from marlhf.placement import sharding

    if config.model.name == "tiny":
        return
    try:
        shape = model_shape(config)
    except ConfigError:
        return
    count = processes.world()
    found, what = device_memory()
    limit = memory or found // (count if what == "machine" else 1)
    # four float32 models with moments and gradients, and much beside
    most = parameters_of(shape) * 64 + rows_at_once(config, count) * cache_bytes(shape, config)
    if most < limit:
        return
    shared = sharding()
    need = estimate(config, count, shared).peak
    if need <= limit:
        return
    advice = "nothing that marlhf has would: take a smaller model"
    ways = [((), 1, shared), (SAVING, 1, shared)]
    ways += [(LORA, 1, False), ((*LORA, *SAVING[1:]), SEVERAL, False), (SAVING, SEVERAL, True)]
    for settings, several, shares in ways:
        several = max(count, several)
        if config.ppo.batch % several or (shares and config.model.lora.rank):
            continue
        rows = fewer_rows(changed(config, settings), several, limit, shares)
        if rows is not None:
            settings = (*settings, *rows)
            peak = estimate(changed(config, settings), several, shares).peak
            more = f" on {several} GPUs" if several > count else ""
            kind = {True: " in shares (FSDP)", False: " without FSDP"}[shares]
            more += kind if shares != shared else ""
            advice = f"{' '.join(settings)}{more} would take {peak / GIB:.1f}"
            break
    raise ConfigError(
        f"{config.name}: PPO of {config.model.name} needs {need / GIB:.1f} GiB and the {what} has "
        f"{limit / GIB:.1f}: {advice} (marlhf plan {config.name})"
    )
