"""The trainer: its four steps, its loop, and what must not change a number."""

import copy

import numpy as np
import pytest
import torch

from marlhf.config import load_config
from marlhf.evaluate import distinct, summarise
from marlhf.models import load_policy, load_scalar, response_tokens, save_model
from marlhf.ppo import PPOTrainer, TrainingError
from marlhf.runs import Run
from marlhf.tasks import get_task
from marlhf.text import train_tokenizer

SMALL = {
    "data.size": 160,
    "data.valid": 8,
    "data.response_tokens": 24,
    "model.tiny.hidden": 32,
    "model.tiny.ff": 32,
    "eval.prompts": 8,
    "eval.every": 2,
    "ppo.batch": 8,
    "ppo.updates": 4,
    "ppo.checkpoint_every": 2,
}


class CountLetter:
    """A reward that a policy learns within a few updates: the share of vowels in the text."""

    mean, std = 0.0, 1.0

    def __call__(self, examples, responses, columns):
        shares = [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in responses]
        return 10 * np.array(shares, np.float32)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(data, folder of a policy, folder of a scalar model), all untrained."""
    folder = tmp_path_factory.mktemp("models")
    config = load_config("tldr-smoke", SMALL)
    data = get_task("tldr").load(config.data)
    tokenizer = train_tokenizer([e.prompt.text + e.response for e in data.sft], 400)
    policy = load_policy(config.model, tokenizer)
    save_model(policy, tokenizer, folder / "policy")
    scalar = load_scalar(config.model, tokenizer, folder / "policy")
    save_model(scalar, tokenizer, folder / "scalar")
    return data, folder / "policy", folder / "scalar"


def make(world, run=None, reward=None, **overrides):
    data, policy, scalar = world
    options = {key.replace("__", "."): value for key, value in overrides.items()}
    config = load_config("tldr-smoke", SMALL, options)
    trainer = PPOTrainer(config, data, policy, scalar, run)
    if reward is not None:
        trainer.reward = trainer.evaluator.reward = reward
    return trainer


def step(trainer, update=0):
    rollout = trainer.score(trainer.rollout(update))
    advantages = trainer.advantages(rollout)
    return rollout, advantages, trainer.update(rollout, advantages)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.actor.named_parameters()}


def largest_difference(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_first_pass_has_ratio_one(world):
    rollout, _, stats = step(make(world))
    assert stats["clip_fraction"] == 0
    assert stats["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert rollout.mask.any() and not torch.isnan(rollout.values).any()


@pytest.mark.parametrize("micro", [8, 4, 2, 1])
def test_micro_batches_give_the_gradient_of_the_whole(world, micro):
    whole, parts = make(world), make(world, ppo__micro_batch=micro)
    step(whole)
    step(parts)
    assert largest_difference(weights(whole), weights(parts)) < 2e-5


def test_sampler_that_is_not_the_learner_is_found(world):
    trainer = make(world)
    rollout = trainer.score(trainer.rollout(0))
    rollout.logprobs = rollout.logprobs - 0.5
    with pytest.raises(TrainingError, match="sampler and learner differ"):
        trainer.update(rollout, trainer.advantages(rollout))


def test_top_k_keeps_the_ratio_at_one_then_moves(world):
    trainer = make(world, ppo__sampling__top_k=5, ppo__passes=2)
    rollout, _, stats = step(trainer)
    assert rollout.kept.shape[-1] == 5
    assert (rollout.kept == rollout.tokens.unsqueeze(-1)).any(-1)[rollout.mask].all()
    assert 1 < stats["ratio_max"] < 5  # finite although tokens may have left the top 5


def test_passes_and_minibatches_count_optimizer_steps(world):
    trainer = make(world, ppo__passes=2, ppo__minibatches=4)
    step(trainer)
    states = trainer.optimizer.state_dict()["state"]
    assert {int(state["step"]) for state in states.values()} == {8}


def test_token_termination_is_ngram_of_one(world):
    one = make(world, ppo__macro__termination="fixed", ppo__macro__n=1)
    token = make(world, ppo__macro__termination="token")
    step(one)
    step(token)
    assert largest_difference(weights(one), weights(token)) == 0


@pytest.mark.parametrize("termination", ["fixed", "random", "perplexity", "whole"])
def test_tokens_of_a_macro_action_share_the_advantage(world, termination):
    trainer = make(world, ppo__macro__termination=termination)
    rollout, advantages, _ = step(trainer)
    for row in range(len(rollout.tokens)):
        keep = rollout.mask[row]
        pairs = {
            (int(s), float(a))
            for s, a in zip(
                advantages.segments[row][keep], advantages.advantages[row][keep], strict=True
            )
        }
        assert len(pairs) == int(advantages.segments[row].max()) + 1


def test_final_reward_and_kl_add_up(world):
    trainer = make(world, ppo__kl_coef=0.1)
    rollout = trainer.score(trainer.rollout(0))
    rollout.full_logprobs = rollout.full_logprobs + 0.01 * rollout.mask  # as if it had moved
    rewards = trainer.advantages(rollout).rewards
    expected = rollout.scores - 0.1 * (rollout.kl * rollout.mask).sum(1)
    torch.testing.assert_close(rewards.sum(1), expected, atol=1e-5, rtol=1e-5)
    assert (rollout.kl * rollout.mask).sum() > 0


def test_missing_end_costs_and_scores_are_clipped(world):
    trainer = make(world, ppo__reward_clip=0.01, ppo__missing_end_penalty=1.0)
    rollout = trainer.score(trainer.rollout(0))
    clipped = torch.from_numpy(rollout.rm_scores).clamp(-0.01, 0.01)
    torch.testing.assert_close(rollout.scores, clipped - (~rollout.finished).float())


def test_reference_does_not_move(world):
    trainer = make(world, reward=CountLetter())
    before = trainer.rollout(0)
    reference = trainer.score(before).ref_logprobs.clone()
    trainer.update(before, trainer.advantages(before))
    again = trainer.score(copy.copy(before))
    torch.testing.assert_close(again.ref_logprobs, reference, atol=0, rtol=0)
    assert largest_difference(weights(trainer), weights(make(world))) > 0


def test_lora_trains_adapters_alone_and_its_reference_is_the_base(world):
    trainer = make(world, model__lora__rank=4, reward=CountLetter())
    rollout = trainer.score(trainer.rollout(0))
    assert float(rollout.kl.abs().max()) < 1e-5  # adapters start at zero
    before = weights(trainer)
    trainer.update(rollout, trainer.advantages(rollout))
    moved = {n for n, p in weights(trainer).items() if not torch.equal(p, before[n])}
    assert moved and all("lora" in name or "score" in name for name in moved)


def test_critic_starts(world):
    from_rm, zero = make(world), make(world, ppo__critic_init="zero")
    ids = torch.arange(5, 25).view(2, 10)
    starts = torch.tensor([3, 4])
    mask = torch.ones(2, 4, dtype=torch.bool)
    assert zero.actor(ids, starts, mask, parts="values").abs().max() == 0
    assert from_rm.actor(ids, starts, mask, parts="values").abs().max() > 0


def test_policy_learns_a_simple_reward(world):
    settings = {"lr": 1e-2, "critic_lr": 1e-2, "kl_coef": 0.0, "batch": 32, "critic_init": "zero"}
    settings = {f"ppo__{key}": value for key, value in settings.items()}
    trainer = make(world, reward=CountLetter(), **settings)
    scores = [float(step(trainer, update)[0].rm_scores.mean()) for update in range(14)]
    assert scores[0] < 2.5 and scores[-1] > 4.5


def test_prompts_of_processes_partition_the_batch_and_epochs_cover_all(world):
    trainer = make(world)
    count = len(trainer.prompts)
    seen = [i for update in range(count // 8 + 1) for i in trainer._prompt_index(update)]
    assert sorted(seen[:count]) == list(range(count))
    assert seen[:count] != list(range(count))


def open_run(folder, **settings):
    return Run.open("ppo", "test", {"stage": "ppo", "config": settings}, root=folder)


def rows_of(run, table):
    frame = run.frame(table)
    return frame.drop(columns=[c for c in frame if "sec" in c])


def test_resumed_training_is_bit_identical(world, tmp_path):
    whole = make(world, run=open_run(tmp_path / "a"))
    whole.train()
    first = make(world, run=open_run(tmp_path / "b"))
    stop = first.one_update

    def fail_at_four(update):
        if update == 3:
            raise KeyboardInterrupt
        return stop(update)

    first.one_update = fail_at_four
    with pytest.raises(KeyboardInterrupt):
        first.train()
    first.run.close()
    second = make(world, run=open_run(tmp_path / "b"))
    second.train()
    assert largest_difference(weights(whole), weights(second)) == 0
    for table in ("metrics", "evals", "samples"):
        left, right = rows_of(whole.run, table), rows_of(second.run, table)
        assert left.equals(right), table
    assert list(whole.run.frame("evals")["update"]) == [0, 2, 4]


def test_score_that_is_not_finite_stops_with_a_checkpoint(world, tmp_path):
    class Breaks(CountLetter):
        def __call__(self, examples, responses, columns):
            scores = super().__call__(examples, responses, columns)
            if trainer.done == 1:
                scores[2] = np.nan
            return scores

    trainer = make(world, run=open_run(tmp_path), reward=Breaks())
    trainer.evaluator.reward = CountLetter()
    with pytest.raises(TrainingError, match="update 2: the score of prompt .* is nan"):
        trainer.train()
    assert trainer.run.latest_checkpoint()[0] == 1


def test_loss_that_is_not_finite_names_the_batch(world, tmp_path):
    trainer = make(world, run=open_run(tmp_path))
    rollout = trainer.score(trainer.rollout(0))
    advantages = trainer.advantages(rollout)
    advantages.returns[0] = float("inf")
    before = weights(trainer)
    with pytest.raises(TrainingError, match=rollout.examples[0].id):
        trainer.update(rollout, advantages)
    assert largest_difference(weights(trainer), before) == 0


def test_evaluation_repeats_itself_whatever_the_batch(world):
    rows = make(world).evaluator(make(world).actor.policy)
    trainer = make(world, eval__batch=3)
    again = trainer.evaluator(trainer.actor.policy)
    assert [r["response"] for r in rows] == [r["response"] for r in again]
    np.testing.assert_allclose([r["kl"] for r in rows], 0, atol=1e-4)
    summary = summarise(rows)
    assert summary["prompts"] == 8 and summary["true_score"] is not None


def test_distinct_counts_different_bigrams():
    assert distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct(["a b", "c d"], 2) == 1
    assert distinct(["", "a"], 2) == 0


def test_rows_stand_by_length_and_are_cut_to_the_longest(world):
    trainer = make(world)
    with torch.no_grad():  # some responses end early
        trainer.actor.policy.get_input_embeddings().weight[trainer.tokenizer.eos_token_id] *= 4
    rollout = trainer.rollout(0)
    lengths = rollout.mask.sum(1)
    assert lengths.unique().numel() > 1
    whole = rollout.starts + lengths
    assert (whole.diff() >= 0).all()
    index = torch.tensor([0, 2])
    ids, starts, tokens, mask, kept = rollout.rows(index)
    assert ids.shape[1] == whole[index].max() and tokens.shape[1] == lengths[index].max()
    assert torch.equal(rollout.widen(mask.int()).bool(), rollout.mask[index])
    assert torch.equal(response_tokens(ids, starts, mask.shape[1])[mask], tokens[mask])
    assert torch.equal(tokens[mask], rollout.tokens[index][rollout.mask[index]])
    assert kept is None


def test_an_update_reads_rows_in_parts_as_it_would_whole(world, monkeypatch):
    """Scores, reference and weights after a step do not depend on how rows are put together."""
    made = []
    for parts in (1, 4):
        monkeypatch.setattr("marlhf.ppo.PARTS", parts)
        trainer = make(world)
        rollout, advantages, _ = step(trainer)
        made.append((rollout.ref_logprobs, rollout.values, advantages.returns, weights(trainer)))
    for one, other in zip(made[0][:3], made[1][:3], strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    assert largest_difference(made[0][3], made[1][3]) < 2e-5
