"""Repeated samples from a finished policy: what best-of-N, pass@k and temperature sweeps are read
from (Fig. 8, 21, Table 3).

Sample number k of a prompt is drawn from the same random numbers at every temperature, in every
arm and in every chain; number 0 at the training temperature is the last evaluation of training.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from marlhf.config import Config, LoraConfig
from marlhf.evaluate import Evaluator, Prompts, summarise
from marlhf.models import Reference, load_policy, reuse_memory
from marlhf.rewards import RewardModel, TrueScore
from marlhf.runs import Run
from marlhf.tasks import get_task
from marlhf.tasks.base import TaskData
from marlhf.text import load_tokenizer

TEXTS = ("prompt", "response")


def sample_repeatedly(
    config: Config, data: TaskData, run: Run, policy: Path, sft: Path, rm: Path | None = None
) -> None:
    """Samples the finished run `policy` as `config.repeat` says and finishes the run.

    Table "repeated": prompt_id, sample, temperature, rm_score and true_score (null where there is
    none), kl to the SFT model, length, finished, the task's labels; prompt and response of the
    first repeat.texts prompts. At temperature 0 there is one sample. Summary: means a temperature.
    """
    settings, source = config.repeat, policy / "model"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reuse_memory()
    tokenizer = load_tokenizer(source, trust_remote_code=config.model.trust_remote_code)
    # it is only read: no adapters, nothing recomputed
    model = replace(config.model, lora=LoraConfig(), gradient_checkpointing=False)
    actor = load_policy(model, tokenizer, source).to(device).eval()
    examples = data.valid[: settings.prompts or config.eval.prompts]
    task = get_task(config.data.task)
    evaluator = Evaluator(
        prompts=Prompts(examples, tokenizer, config.data.prompt_tokens),
        tokenizer=tokenizer,
        reference=Reference(load_policy(model, tokenizer, sft / "model").to(device)),
        reward=RewardModel.load(rm / "model", config, device=device) if rm else None,
        truth=TrueScore(task) if task.has_truth(config.data) else None,
        length=config.data.response_tokens,
        temperature=0.0,
        top_k=config.ppo.sampling.top_k,
        seed=config.data.seed,
        batch=config.eval.batch,
        device=device,
    )
    run.resume()  # nothing was kept: begins anew
    labels = [task.labels(example) for example in examples]
    temperatures = settings.temperatures or [config.ppo.sampling.temperature]
    numbers = {t: range(settings.samples if t else 1) for t in temperatures}
    total, done, means = sum(map(len, numbers.values())), 0, {}
    for temperature in temperatures:
        rows = []
        for number in numbers[temperature]:
            found = replace(evaluator, temperature=temperature, number=number)(actor)
            for index, row in enumerate(found):
                head = {"sample": number, "temperature": temperature, **labels[index]}
                kept = {k: v for k, v in row.items() if index < settings.texts or k not in TEXTS}
                run.log("repeated", kept | head)
            rows, done = rows + found, done + 1
            run.progress(done, total)
        means[f"{temperature:g}"] = summarise(rows) | {"prompts": len(examples)}
    run.finish({"samples": settings.samples, "temperatures": means})
