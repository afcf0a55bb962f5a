"""Stage 3: PPO with macro actions (Alg. 1), in four steps that can be called one by one.

    trainer = PPOTrainer(config, data, sft, rm)
    rollout = trainer.rollout(update)        # sample responses
    trainer.score(rollout)                   # rewards, reference, values
    advantages = trainer.advantages(rollout) # macro actions, GAE over them, spread back to tokens
    metrics = trainer.update(rollout, advantages)

Shapes: B responses, T tokens of the longest, M macro actions of the row with most. All randomness
is keyed by (seed, stream, update, prompt): a resumed run repeats what an unbroken one does.
Several processes (`marlhf.processes`) share the prompts of an update: what is optimised, whitened
and logged is that of all of them together, whatever their number.
"""

import functools
import json
import math
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from marlhf import processes
from marlhf.config import Config, MacroConfig
from marlhf.evaluate import Evaluator, Prompts, response_texts, summarise
from marlhf.macro import macro_gae
from marlhf.models import ActorCritic, pack, reuse_memory, save_model
from marlhf.objectives import (
    masked_mean,
    policy_loss,
    policy_stats,
    token_rewards,
    value_loss,
    whiten,
)
from marlhf.placement import (
    adopt,
    loading_device,
    make_accelerator,
    place,
    sharding,
    whole_state,
    working_dtype,
)
from marlhf.rewards import TrueScore
from marlhf.roles import make_optimizer, make_roles, merged_critic
from marlhf.rollout import Advantages, Rollout, diagnostics, whole
from marlhf.runs import Run, TrainingError, keyed_rng
from marlhf.sampling import Sampler, keyed_uniforms
from marlhf.segment import Segmenter, check_segments, make_segmenter
from marlhf.tasks import get_task
from marlhf.tasks.base import TaskData
from marlhf.text import load_tokenizer

PARTS = 4  # forward passes over a rollout, whose rows stand by length: a tenth less padding
# The largest gap that rounding leaves between the sampler's log-probability of a token and the
# learner's on the first pass; a larger one means that they are not the same policy.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1.0, torch.float16: 0.3}
MAXIMA = ("gap", "ratio_max")  # what does not add up over micro-batches


def segmenter_by_name(macro: MacroConfig) -> Segmenter:
    """The termination condition that settings name, among those that need nothing but tokens."""
    settings = {name: getattr(macro, name) for name in ("n", "lengths", "repeats", "reading")}
    return make_segmenter(macro.termination, **settings)


def segment_generators(seed: int, rollout: Rollout) -> list[torch.Generator]:
    """A random termination condition's chance, a generator a row."""
    key = (seed, "segments", rollout.update)
    return [
        torch.Generator().manual_seed(int(keyed_rng(*key, example.id).integers(2**62)))
        for example in rollout.examples
    ]


class PPOTrainer:
    """MA-PPO on one task. `config.ppo.macro` chooses the termination condition; "token" is PPO.

    `sft` is the folder (or hub name) of the policy to start from and its reference, `rm` that of
    the reward model (None where the task scores itself). With a `run`, `train` is resumable.
    """

    def __init__(
        self,
        config: Config,
        data: TaskData,
        sft: str | Path,
        rm: str | Path | None = None,
        run: Run | None = None,
    ):
        self.config, self.ppo, self.data, self.run = config, config.ppo, data, run
        self.accelerator = make_accelerator(config.model)
        self.device = self.accelerator.device
        self.world = self.accelerator.num_processes
        if self.ppo.batch % self.world:
            raise ValueError(
                f"ppo.batch={self.ppo.batch} prompts is not a multiple of {self.world} processes"
            )
        reuse_memory()
        self.tokenizer = load_tokenizer(
            str(sft), config.model.revision, config.model.trust_remote_code
        )
        self.task = get_task(config.data.task)
        roles = make_roles(config, self.tokenizer, sft, rm, loading_device(self.device))
        actor, self.reference, self.reward = roles.actor, roles.reference, roles.reward
        self.truth = TrueScore(self.task) if self.task.has_truth(config.data) else None
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(
            actor, *make_optimizer(actor, self.ppo)
        )
        if sharding():
            adopt(self.model)
            for frozen in (self.reference, self.reward):
                if hasattr(frozen, "model"):
                    frozen.model = place(frozen.model, self.accelerator)
        self.segmenter = self.make_segmenter()
        if len(data.ppo) < self.ppo.batch:
            raise ValueError(
                f"ppo.batch={self.ppo.batch} prompts, but the PPO part of the data has "
                f"{len(data.ppo)}: lower ppo.batch or give more rows"
            )
        budget = config.data.prompt_tokens
        self.prompts = Prompts(data.ppo, self.tokenizer, budget)
        self.evaluator = Evaluator(
            prompts=Prompts(data.valid[: config.eval.prompts], self.tokenizer, budget),
            tokenizer=self.tokenizer,
            reference=self.reference,
            reward=self.reward,
            truth=self.truth,
            length=config.data.response_tokens,
            temperature=self.ppo.sampling.temperature,
            top_k=self.ppo.sampling.top_k,
            compile=self.ppo.sampling.compile,
            seed=config.data.seed,
            batch=config.eval.batch,
            device=self.device,
        )
        self.done, self.seconds = 0, 0.0
        self._stepped = False  # the weights are between two updates, unless this is set

    @property
    def actor(self) -> ActorCritic:
        return self.accelerator.unwrap_model(self.model)

    def make_segmenter(self) -> Segmenter:
        return segmenter_by_name(self.ppo.macro)

    # The four steps

    def rollout(self, update: int) -> Rollout:
        """Samples a response to each prompt of this update (of this process' share of them)."""
        config = self.config
        examples, ids, mask = self.prompts.batch(self._prompt_index(update))
        uniforms = keyed_uniforms(
            config.seed, "rollout", update, [e.id for e in examples], config.data.response_tokens
        )
        ids, mask = ids.to(self.device), mask.to(self.device)
        sampling = self.ppo.sampling
        sampler = Sampler(
            self.actor.policy, self.tokenizer, sampling.temperature, sampling.top_k,
            min(sampling.rows or len(ids), len(ids)), sampling.compile,
        )  # fmt: skip
        sample = sampler(ids, mask, uniforms)
        order = (mask.sum(1) + sample.mask.sum(1)).argsort(stable=True)
        sample, examples = sample[order], [examples[i] for i in order.tolist()]
        longest = int(sample.mask.sum(1).max())
        packed, starts = pack(ids[order], mask[order], sample.tokens, sample.mask, sampler.pad)
        return Rollout(
            update=update,
            examples=examples,
            places=order.cpu() * self.world + processes.rank(),
            texts=response_texts(sample, self.tokenizer),
            ids=packed,
            starts=starts,
            tokens=sample.tokens[:, :longest],
            mask=sample.mask[:, :longest],
            finished=sample.finished,
            logprobs=sample.logprobs[:, :longest],
            full_logprobs=sample.full_logprobs[:, :longest],
            kept=None if sample.kept is None else sample.kept[:, :longest],
        )

    def _prompt_index(self, update: int) -> list[int]:
        """This process' prompts of an update: epochs of the prompts, each shuffled by its key."""
        count, batch = len(self.prompts), self.ppo.batch
        places = range(update * batch, (update + 1) * batch)
        orders = {
            epoch: keyed_rng(self.config.seed, "prompts", epoch).permutation(count)
            for epoch in {place // count for place in places}
        }
        index = [int(orders[place // count][place % count]) for place in places]
        return processes.deal(index)

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Rollout:
        """Scores of the texts, the reference's log-probabilities, the critic's values."""
        columns = {
            "finished": rollout.finished.tolist(),
            "length": rollout.mask.sum(1).tolist(),
        }
        examples, texts = rollout.examples, rollout.texts
        rollout.rm_scores = np.asarray(self.reward(examples, texts, columns), np.float32)
        bad, error = np.flatnonzero(~np.isfinite(rollout.rm_scores)), None
        if len(bad):
            error = TrainingError(
                f"update {rollout.update + 1}: the score of prompt {examples[bad[0]].id!r} is "
                f"{rollout.rm_scores[bad[0]]}; its response: {texts[bad[0]]!r}"
            )
        processes.agree(error)
        if self.truth is not None:
            rollout.true_scores = np.asarray(self.truth(examples, texts, columns), np.float32)
        scores = torch.from_numpy(rollout.rm_scores).to(self.device)
        if self.ppo.reward_clip is not None:
            scores = scores.clamp(-self.ppo.reward_clip, self.ppo.reward_clip)
        rollout.scores = scores - self.ppo.missing_end_penalty * (~rollout.finished).float()

        temperatures = [self.ppo.sampling.temperature]
        if self.ppo.macro.termination == "perplexity":
            temperatures.append(1.0)
        every = torch.arange(len(examples))
        found = []
        for index in every.split(self._rows):
            read = rollout.rows(index)[:4]
            found.append([rollout.widen(x) for x in self.reference.logprobs(*read, *temperatures)])
        reference = [torch.cat(parts) for parts in zip(*found, strict=True)]
        rollout.ref_logprobs, rollout.ref_logprobs_1 = reference[0], reference[-1]
        if self._one_forward:
            # the update's only forward pass is here, so the old values cost no pass of their own
            with torch.enable_grad():
                rollout.forward = self._forward(rollout, every)
            rollout.values = rollout.forward[1].detach()
        else:
            (rollout.values,) = self._forward(rollout, every, "values")
        return rollout

    @property
    def _one_forward(self) -> bool:
        ppo = self.ppo
        single = ppo.passes == 1 and ppo.minibatches == 1 and ppo.micro_batch is None
        return single and self.world == 1

    @property
    def _rows(self) -> int:
        """Rows in a forward pass: a micro-batch, else a part of the rollout of like lengths (the
        wrapper for several processes wants one forward pass for each backward pass)."""
        parts = PARTS if self.world == 1 else 1
        return self.ppo.micro_batch or math.ceil(self.ppo.batch / self.world / parts)

    def _forward(self, rollout: Rollout, index: torch.Tensor, parts: str = "both") -> tuple:
        """What `ActorCritic` gives for some rows, ``[n, T]`` each, some rows at a time."""
        made = []
        for some in index.split(self._rows):
            ids, starts, _, mask, kept = rollout.rows(some)
            found = self.model(ids, starts, mask, self.ppo.sampling.temperature, kept, parts)
            found = found if isinstance(found, tuple) else (found,)
            made.append([rollout.widen(x) for x in found])
        return tuple(torch.cat(column) for column in zip(*made, strict=True))

    def advantages(self, rollout: Rollout) -> Advantages:
        """Macro actions, their rewards and values, GAE over them (Alg. 1), spread to tokens."""
        ppo, mask = self.ppo, rollout.mask
        generators = None
        if ppo.macro.termination == "random":
            generators = segment_generators(self.config.seed, rollout)
        segments = self.segmenter(
            rollout.tokens, mask, ref_logprobs=rollout.ref_logprobs_1, generator=generators
        )
        if self.device.type == "cpu":
            check_segments(segments, mask)
        rewards = token_rewards(rollout.scores, rollout.kl, mask, ppo.kl_coef)
        advantages, returns = macro_gae(
            rewards,
            rollout.values,
            segments,
            ppo.gamma,
            ppo.lam,
            ppo.macro.value_weights,
            ppo.macro.reward_weights,
        )
        if ppo.whiten:
            advantages = whiten(advantages, mask, total=self.accelerator.reduce)
        return Advantages(segments, rewards, advantages, returns)

    def update(self, rollout: Rollout, advantages: Advantages) -> dict[str, float]:
        """Passes over the rollout in minibatches, an optimizer step each. -> what to watch."""
        stats = []
        for number in range(self.ppo.passes):
            # an order of the prompts of all processes, of which each takes those that it has
            order = torch.arange(self.ppo.batch)
            if self.ppo.minibatches > 1:
                rng = keyed_rng(self.config.seed, "minibatches", rollout.update, number)
                order = torch.from_numpy(rng.permutation(self.ppo.batch))
            for places in order.chunk(self.ppo.minibatches):
                index = torch.isin(rollout.places, places).nonzero().flatten()  # by length
                stats.append(self._step(rollout, advantages, index, first=not stats))
        rollout.forward = None
        self.done, self._stepped = rollout.update + 1, False
        return {name: float(np.mean([s[name] for s in stats])) for name in stats[0]}

    def _step(self, rollout, advantages, index, first: bool) -> dict[str, float]:
        """One optimizer step on the rows `index`, in micro-batches of one gradient."""
        # every micro-batch of every process divides by the tokens of the whole minibatch
        tokens = self.accelerator.reduce(rollout.mask[index].sum().float()) / self.world
        parts = list(index.split(self.ppo.micro_batch or max(1, len(index))))
        # weights in shares: every process goes through as many passes
        parts += [index[:0]] * (max(processes.gather(len(parts))) - len(parts))
        rows = []
        for number, micro in enumerate(parts, 1):
            last = number == len(parts)
            # gradients are summed over processes once, in the last backward pass
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss, row = self._loss(rollout, advantages, micro, tokens, first)
                self.accelerator.backward(loss)
            rows.append(row)
        totals = processes.statistics(rows, MAXIMA)
        self._check(rollout, totals, index, first)
        norms = [
            self.accelerator.clip_grad_norm_(group["params"], self.ppo.max_grad_norm)
            for group in self.optimizer.param_groups
        ]
        lr = self.scheduler.get_last_lr()[0]
        self._stepped = True
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return totals | {
            "grad_norm": float(norms[0]),
            "critic_grad_norm": float(norms[1]),
            "lr": lr,
        }

    def _check(self, rollout, totals: dict[str, float], index, first: bool) -> None:
        """Raises TrainingError, in all processes, where the step must not be taken."""
        update, gap = rollout.update, totals.pop("gap")
        dtype = working_dtype(self.actor.policy)
        limit = TOLERANCE[dtype]
        # the ratio of the first pass is 1: what was sampled from is what is optimised
        if first and gap > limit and update == self.done:
            raise processes.everywhere(
                TrainingError,
                f"update {update + 1}: sampler and learner differ by {gap:.3g} in a token's "
                f"log-probability ({limit} is rounding in {dtype}): this architecture "
                "treats its cache, padding or logits in a way that marlhf does not know",
            )
        if all(math.isfinite(totals[name]) for name in ("policy_loss", "value_loss")):
            return
        names = ", ".join(rollout.examples[i].id for i in index[:3].tolist())
        raise processes.everywhere(
            TrainingError,
            f"update {update + 1}: the loss is not finite (policy {totals['policy_loss']}, value "
            f"{totals['value_loss']}) on the batch of prompts {names}, ...",
        )

    def _loss(self, rollout, advantages, index, tokens, first: bool) -> tuple[torch.Tensor, dict]:
        mask = rollout.mask[index]
        if not len(index):  # no row of this minibatch is here: a row that counts for nothing
            index = torch.zeros(1, dtype=torch.long)
            mask = torch.zeros_like(rollout.mask[index])
        if rollout.forward is not None and len(index) == len(rollout.tokens):
            logprobs, values, entropies = rollout.forward
        else:
            logprobs, values, entropies = self._forward(rollout, index)
        old, segments = rollout.logprobs[index], advantages.segments[index]
        shares = {"ratio": self.ppo.macro.ratio, "segments": segments, "denominator": tokens}
        policy = policy_loss(
            logprobs, old, advantages.advantages[index], mask, self.ppo.clip, **shares
        )
        value = value_loss(
            values,
            rollout.values[index],
            advantages.returns[index],
            mask,
            self.ppo.value_clip,
            denominator=tokens,
        )
        with torch.no_grad():
            stats = policy_stats(logprobs, old, mask, self.ppo.clip, **shares)
            stats |= {
                "policy_loss": policy.detach(),
                "value_loss": value.detach(),
                "entropy": masked_mean(entropies, mask, tokens),
                "gap": torch.where(mask, logprobs - old, 0.0).abs().amax(),
            }
        return policy + value, stats

    # The loop

    def train(self) -> None:
        """All updates, with an evaluation every so many; goes on from the run's last checkpoint."""
        run = self.run
        found = run.resume()
        if found:
            self.load(found[1])
        if self.done == 0:
            self.evaluate()
        while self.done < self.ppo.updates:
            try:
                row = self.one_update(self.done)
            except TrainingError as error:
                where = self._save_failed()
                raise processes.everywhere(TrainingError, f"{error}. {where}") from None
            run.log("metrics", row)
            if self.done % self.config.eval.every == 0 or self.done == self.ppo.updates:
                self.evaluate()
            if self.done % self.ppo.checkpoint_every == 0 and self.done < self.ppo.updates:
                run.save_checkpoint(self.done, self.save)
            run.progress(self.done, self.ppo.updates)

    def one_update(self, update: int) -> dict:
        """Rollout, score, advantages, update; -> the row of metrics."""
        clock = [self._now()]
        rollout = self.rollout(update)
        clock.append(self._now())
        self.score(rollout)
        clock.append(self._now())
        advantages = self.advantages(rollout)
        clock.append(self._now())
        stats = self.update(rollout, advantages)
        clock.append(self._now())
        parts = dict(zip(("rollout", "score", "advantages", "update"), np.diff(clock), strict=True))
        self.seconds += clock[-1] - clock[0]
        count = {"update": self.done, "prompts_seen": self.done * self.ppo.batch}
        rollout, advantages = whole(rollout, advantages)
        return count | diagnostics(rollout, advantages) | stats | {
            "tokens_per_second": int(rollout.mask.sum()) / (clock[-1] - clock[0]),
            **{f"sec_{name}": float(value) for name, value in parts.items()},
            "seconds": self.seconds,
        }  # fmt: skip

    def evaluate(self) -> dict:
        """Scores on the held-out prompts, a row in `evals` and one a prompt in `samples`."""
        start = self._now()
        rows = self.evaluator(self.actor.policy)
        summary = {"update": self.done, "seconds": self.seconds, **summarise(rows)}
        summary["sec_eval"] = self._now() - start
        if self.run is not None:
            self.run.log("evals", summary)
            for row in rows:
                self.run.log("samples", {"update": self.done, **row})
        return summary

    def summary(self) -> dict:
        """What the finished run says of itself: its first and last evaluation, and the time."""
        found = {}
        if processes.main():
            evals = self.run.frame("evals")
            found = {"before": evals.iloc[0].to_dict(), "after": evals.iloc[-1].to_dict()}
        return {**found, "training_seconds": self.seconds}

    def save(self, folder: Path) -> None:
        """Everything that training goes on from: weights, optimizer, schedule, counters."""
        self.accelerator.save_state(str(folder), safe_serialization=False)  # keeps tied weights
        if processes.main():
            state = {"done": self.done, "seconds": self.seconds}
            (folder / "trainer.json").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        self.accelerator.load_state(str(folder))
        state = json.loads((folder / "trainer.json").read_text())
        self.done, self.seconds = state["done"], state["seconds"]

    def _save_failed(self) -> str:
        """Keeps the state that the failing update began from, if it has not stepped yet."""
        self.optimizer.zero_grad()
        if self._stepped:
            return f"The last checkpoint is in {self.run.path}"
        self.run.save_checkpoint(self.done, self.save)
        return f"The state after update {self.done} is kept in {self.run.path}"

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def train_ppo(
    config: Config,
    data: TaskData,
    run: Run,
    sft: Path,
    rm: Path | None,
    kind: type[PPOTrainer] = PPOTrainer,
) -> None:
    """Trains from the finished runs `sft` and `rm`, saves policy and critic, finishes the run."""
    trainer = kind(config, data, sft / "model", rm and rm / "model", run)
    trainer.train()
    actor = trainer.actor
    for name, model in (("model", actor.policy), ("critic", merged_critic(actor))):
        write = functools.partial(save_model, model, trainer.tokenizer, state=whole_state(model))
        run.save_model(write, name)
    run.finish(trainer.summary())
