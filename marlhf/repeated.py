"""Repeated samples from a finished policy: what best-of-N, pass@k and temperature sweeps are read
from (Fig. 8, 21, Table 3).

Sample number k of a prompt is drawn from the same random numbers at every temperature, in every
arm and in every chain; number 0 at the training temperature is the last evaluation of training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from marlhf import processes
from marlhf.config import Config, LoraConfig
from marlhf.evaluate import Evaluator, Prompts, distinct, summarise
from marlhf.models import Reference, load_policy, reuse_memory
from marlhf.rewards import RewardModel, TrueScore
from marlhf.runs import Run
from marlhf.tasks import get_task
from marlhf.tasks.base import TaskData
from marlhf.text import load_tokenizer

TEXTS = ("prompt", "response")


@dataclass
class Witness:
    """The reference as an `Evaluator` calls it, which also notes each response's sum of -log pi_ref
    at temperature 1, in nats, from the same forward pass: rows in the order of the calls."""

    reference: Reference
    nll: list[float] = field(default_factory=list)

    def logprobs(self, ids, starts, tokens, mask, temperature: float) -> list[torch.Tensor]:
        """As `Reference.logprobs` at one temperature."""
        wanted = dict.fromkeys((temperature, 1.0))
        found = self.reference.logprobs(ids, starts, tokens, mask, *wanted)
        self.nll += (-found[-1].double().sum(1)).tolist()
        return found[:1]


def perplexity(rows: Sequence[dict]) -> float:
    """exp of the mean of -log pi_ref over all tokens of the rows' responses (ref_nll, length)."""
    return math.exp(sum(row["ref_nll"] for row in rows) / sum(row["length"] for row in rows))


def sample_repeatedly(
    config: Config, data: TaskData, run: Run, policy: Path, sft: Path, rm: Path | None = None
) -> None:
    """Samples the finished run `policy` as `config.repeat` says and finishes the run.

    Table "repeated": prompt_id, sample, temperature, rm_score and true_score (null where there is
    none), kl to the SFT model, ref_nll (-log probability under it at temperature 1, nats), length,
    finished, the task's labels; prompt and response of the first repeat.texts prompts. At
    temperature 0 there is one sample. Summary: means a temperature, perplexity under the SFT model
    over all of its responses, distinct-1 and distinct-2 over sample 0 of every prompt.
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
    reference = Reference(load_policy(model, tokenizer, sft / "model").to(device))
    evaluator = Evaluator(
        prompts=Prompts(examples, tokenizer, config.data.prompt_tokens),
        tokenizer=tokenizer,
        reference=reference,
        reward=RewardModel.load(rm / "model", config, device=device) if rm else None,
        truth=TrueScore(task) if task.has_truth(config.data) else None,
        length=config.data.response_tokens,
        temperature=0.0,
        top_k=config.ppo.sampling.top_k,
        compile=config.ppo.sampling.compile,
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
            witness = Witness(reference)
            draw = replace(evaluator, temperature=temperature, number=number, reference=witness)
            found = draw(actor)
            nll = processes.undeal(processes.gather(witness.nll))
            for index, (row, value) in enumerate(zip(found, nll, strict=True)):
                row["ref_nll"] = value
                head = {"sample": number, "temperature": temperature, **labels[index]}
                kept = {k: v for k, v in row.items() if index < settings.texts or k not in TEXTS}
                run.log("repeated", kept | head)
            rows, done = rows + found, done + 1
            run.progress(done, total)
        # the more words, the fewer are new: one response a prompt, so that temperatures compare
        first = [row["response"] for row in rows[: len(examples)]]
        means[f"{temperature:g}"] = {
            **summarise(rows),
            **{f"distinct{n}": distinct(first, n) for n in (1, 2)},
            "ref_perplexity": perplexity(rows),
            "prompts": len(examples),
        }
    run.finish({"samples": settings.samples, "temperatures": means})
