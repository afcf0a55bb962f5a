"""What a preset asks of a machine: memory by part, batches, hours; and whether it fits at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from marlhf import processes
from marlhf.config import Config, ConfigError, needs_rm

SAVING = ("model.gradient_checkpointing=true", "ppo.micro_batch=1")
LORA = ("model.lora.rank=64", "model.dtype=bfloat16", "model.gradient_checkpointing=true")
SEVERAL = 8  # processes of the last proposal: GPUs of a node


def changed(config: Config, settings: Sequence[str]) -> Config:
    """The config with some model and PPO settings; batches stay what they are."""
    model, ppo = config.model, config.ppo
    for setting in settings:
        key, _, value = setting.partition("=")
        if key == "model.lora.rank":
            model = replace(model, lora=replace(model.lora, rank=int(value)))
        elif key == "model.dtype":
            model = replace(model, dtype=value)
        elif key == "model.gradient_checkpointing":
            model = replace(model, gradient_checkpointing=value == "true")
        else:
            ppo = replace(ppo, micro_batch=int(value))
    return replace(config, model=model, ppo=ppo)


def preset_plan(config: Config) -> str:
    """The text of `marlhf plan PRESET`."""
    from marlhf.memory import GIB, PARTS, estimate

    variants = [("as the preset says", config, 1)]
    if config.model.name != "tiny" and not config.model.lora.rank:
        variants.append((" ".join(LORA), changed(config, LORA), 1))
    last = variants[-1]
    if config.model.name != "tiny" and config.ppo.batch % SEVERAL == 0:
        variants.append((f"the same on {SEVERAL} GPUs, each", last[1], SEVERAL))
    lines = []
    for title, each, count in variants:
        found = estimate(each, count)
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


def require_fit(config: Config, memory: int | None = None) -> None:
    """Raises ConfigError where PPO of a model that is not tiny cannot fit a process' device, with
    the settings that would; passes where the model's shape is not known."""
    from marlhf.memory import GIB, estimate, model_shape, parameters_of

    if config.model.name == "tiny":
        return
    try:
        size = parameters_of(model_shape(config))
    except ConfigError:
        return
    count = processes.world()
    found, what = device_memory()
    limit = memory or found // (count if what == "machine" else 1)
    if size * 64 < limit:  # four float32 models with moments and gradients, and much beside
        return
    need = estimate(config, count).peak
    if need <= limit:
        return
    advice = "nothing that marlhf has would: take a smaller model"
    for settings, several in ((SAVING, 1), (LORA, 1), ((*LORA, *SAVING[1:]), SEVERAL)):
        each = changed(config, settings)
        if config.ppo.batch % max(count, several):
            continue
        peak = estimate(each, max(count, several)).peak
        if peak <= limit:
            more = f" on {several} GPUs" if several > count else ""
            advice = f"{' '.join(settings)}{more} would take {peak / GIB:.1f}"
            break
    raise ConfigError(
        f"{config.name}: PPO of {config.model.name} needs {need / GIB:.1f} GiB and the {what} has "
        f"{limit / GIB:.1f}: {advice} (marlhf plan {config.name})"
    )
