"""transformers.Trainer as a stage of a run: its checkpoints and metrics are the run's.

Trainer runs the loop (accumulation, clipping, schedule, several processes). Ours are the order of
the rows, drawn from the seed for the whole run at once, so that a resumed run sees the rows that
were to come; checkpoints that appear whole or not at all; and a stop where a loss is not finite.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from marlhf import processes
from marlhf.config import Config, TrainConfig
from marlhf.models import reuse_memory
from marlhf.placement import adopt, plugin_settings, precision, sharding
from marlhf.runs import Run, TrainingError, keyed_rng

WINDOW = 8  # batches within which rows are sorted by length: a tenth less padding
WEIGHTS = "pytorch_model.bin"  # where Trainer looks for them


def data_order(lengths: Sequence[int], batch: int, steps: int, *key: int | str) -> np.ndarray:
    """Numbers of the rows that `steps` batches read, [steps * batch]; all chance comes from `key`.

    Pass after pass over the rows, each in an order of its own; a batch may straddle two passes.
    Within WINDOW batches the rows are sorted by length and the batches shuffled.
    """
    lengths, total = np.asarray(lengths), steps * batch
    passes = math.ceil(total / len(lengths))
    orders = [keyed_rng(*key, number).permutation(len(lengths)) for number in range(passes)]
    order, rng = np.concatenate(orders)[:total], keyed_rng(*key, "batches")
    for start in range(0, total, WINDOW * batch):
        part = order[start : start + WINDOW * batch]
        part = part[np.argsort(lengths[part], kind="stable")].reshape(-1, batch)
        order[start : start + WINDOW * batch] = rng.permutation(part).ravel()
    return order


def step_count(settings: TrainConfig, rows: int) -> int:
    """Optimizer steps of a run over so many rows."""
    return settings.steps or math.ceil(settings.epochs * rows / settings.batch)


class Objective(nn.Module):
    """A model with its loss: what Trainer, and its wrapper for several processes, calls.

    A subclass gives the terms of the loss, `losses(**batch)` [N]. `num_items_in_batch` is their
    number in the batch of a whole optimizer step: a micro-batch returns its share of that mean.
    """

    accepts_loss_kwargs = True  # Trainer counts the labels of all micro-batches, and passes it

    def __init__(self, model):
        super().__init__()
        self.model = model
        # what a wrapper that shares weights out takes for one unit: a layer
        self._no_split_modules = getattr(model, "_no_split_modules", None)

    def forward(self, num_items_in_batch=None, **batch) -> dict:
        with precision(self.model):
            losses = self.losses(**batch)
        count = len(losses) if num_items_in_batch is None else num_items_in_batch
        return {"loss": losses.sum() / count}


class StageTrainer(Trainer):
    """Trainer whose checkpoints and metrics are the run's, and which stops at a bad loss."""

    def __init__(self, stage: str, objective: Objective, rows, collate, config: Config, run: Run):
        settings, seed = getattr(config, stage), config.seed
        self.run, self.stage, self.batch_rows = run, stage, []
        self.total, self.passes = step_count(settings, len(rows)), settings.batch / len(rows)
        reuse_memory()
        lengths = [row.length for row in rows]
        order = data_order(lengths, settings.batch, self.total, seed, stage)
        arguments = training_arguments(settings, self.total, seed, run.path)
        arguments.fsdp_plugin_args = plugin_settings(config.model)
        super().__init__(
            objective,
            arguments,
            data_collator=collate,
            train_dataset=[rows[i] for i in order],
        )
        self.folder = str(run.path)
        self.remove_callback(PrinterCallback)

    def go(self) -> None:
        """Trains to the end: from the start, or from the run's last checkpoint."""
        found = self.run.resume()
        if found is None:
            self.train()
            adopt(self.model)
            return
        step, folder = found[0], found[1] / f"checkpoint-{found[0]}"
        if step < self.total or sharding():
            self.train(resume_from_checkpoint=str(folder))
            adopt(self.model)
        else:  # killed while it was being evaluated
            self.model.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True))

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batch_rows += inputs.pop("rows")
        loss = super().training_step(model, inputs, num_items_in_batch)
        if processes.world() == 1:  # of several, all meet it in the norm of the common gradient
            self._require_finite("loss", loss)
        return loss

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        self._require_finite("gradient norm", norm)
        self.batch_rows = []
        return norm

    def _require_finite(self, what: str, value) -> None:
        """The optimizer has not stepped yet, so the state that is kept is a good one."""
        if math.isfinite(value):
            return
        step = self.state.global_step
        self._save_checkpoint(self.model, None)
        raise processes.everywhere(
            TrainingError,
            f"{self.stage} step {step + 1}: the {what} is {float(value)} on the batch of rows "
            f"{', '.join(self.batch_rows[:3])}, ... The state after step {step} is kept in "
            f"{self.run.path}; look at those rows, or lower {self.stage}.lr",
        )

    def log(self, logs: dict, start_time: float | None = None) -> None:
        if "loss" not in logs:  # Trainer's own summary at the end
            return
        step = self.state.global_step
        row = {
            "step": step,
            "epoch": step * self.passes,
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "seconds": self.run.seconds,
        }
        self.run.log("metrics", row)
        self.run.progress(step, self.total)

    # Trainer writes the files of a checkpoint one by one; the run makes them appear at once.

    def _save_checkpoint(self, model, trial) -> None:
        def write(folder: Path) -> None:
            self.folder = str(folder)
            super(StageTrainer, self)._save_checkpoint(model, trial)

        self.run.save_checkpoint(self.state.global_step, write)

    def _get_output_dir(self, trial) -> str:
        return self.folder

    def _save(self, output_dir=None, state_dict=None) -> None:
        # torch's own format, because safetensors refuses tied weights
        os.makedirs(output_dir, exist_ok=True)
        torch.save(state_dict or self.model.state_dict(), Path(output_dir) / WEIGHTS)


def training_arguments(
    settings: TrainConfig, steps: int, seed: int, folder: Path
) -> TrainingArguments:
    """Trainer's settings for ours; `batch` is that of all processes and micro-batches together.

    Raises ValueError where the batch cannot be divided so.
    """
    gpu = torch.cuda.is_available()
    world = processes.world()
    micro = settings.micro_batch or max(1, settings.batch // world)
    if settings.batch % (micro * world):
        raise ValueError(
            f"a batch of {settings.batch} rows is not a multiple of {world} processes with "
            f"micro-batches of {micro}: change batch or micro_batch"
        )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch // (micro * world),
        train_sampling_strategy="sequential",  # the rows come in our order
        learning_rate=settings.lr,
        warmup_steps=math.ceil(settings.warmup * steps),
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(
            settings.schedule, settings.schedule
        ),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch_fused",
        seed=seed,
        save_strategy="steps",
        save_steps=settings.checkpoint_every,
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=gpu,
        disable_tqdm=True,
        report_to="none",
        use_cpu=not gpu,
        ddp_backend=None if gpu or world == 1 else "gloo",
        ddp_find_unused_parameters=False,
    )
    if arguments.n_gpu > 1:  # several GPUs are for several processes, not for DataParallel
        arguments._n_gpu = 1
    return arguments
