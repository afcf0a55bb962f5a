"""Four roles on one LoRA trunk: the same numbers as models of their own, one base in memory."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from marlhf.config import load_config
from marlhf.models import load_policy, load_scalar, save_model, sequence_scores
from marlhf.ppo import PPOTrainer
from marlhf.rewards import RewardModel
from marlhf.roles import ADAPTER, Role, adapters, merged_critic, on_trunk, save_adapter
from marlhf.tasks import get_task
from marlhf.text import train_tokenizer

SMALL = {
    "data.size": 160,
    "data.valid": 8,
    "data.response_tokens": 24,
    "model.tiny.hidden": 32,
    "model.tiny.ff": 32,
    "model.lora.rank": 4,
    "eval.prompts": 8,
    "ppo.batch": 8,
    "ppo.updates": 4,
}
ROWS = [list(range(5, 25)), list(range(30, 37))]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(data, folder of the SFT model, folder of a reward model that is an adapter of it)."""
    folder = tmp_path_factory.mktemp("models")
    config = load_config("tldr-smoke", SMALL)
    data = get_task("tldr").load(config.data)
    tokenizer = train_tokenizer([e.prompt.text + e.response for e in data.sft], 400)
    whole = replace(config.model, lora=replace(config.model.lora, rank=0))
    save_model(load_policy(whole, tokenizer), tokenizer, folder / "sft")
    scalar = load_scalar(config.model, tokenizer, folder / "sft")
    with torch.no_grad():  # as if it had been trained
        for name, parameter in scalar.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    scorer = RewardModel(scalar, tokenizer, 96, 24, mean=0.5, std=2.0)
    scorer.save(folder / "rm")
    save_adapter(scalar, folder / "rm", folder / "sft")
    return data, folder / "sft", folder / "rm", scorer.score_ids(ROWS)


def make(world, rm=True, **overrides):
    data, sft, folder, _ = world
    options = {key.replace("__", "."): value for key, value in overrides.items()}
    config = load_config("tldr-smoke", SMALL, options)
    return PPOTrainer(config, data, sft, folder if rm else None)


def one_update(trainer, update=0):
    rollout = trainer.score(trainer.rollout(update))
    advantages = trainer.advantages(rollout)
    return rollout, trainer.update(rollout, advantages)


def count(module):
    return sum(p.numel() for p in {id(p): p for p in module.parameters()}.values())


def test_one_base_for_four_roles(world):
    trainer = make(world)
    actor = trainer.actor
    assert isinstance(actor.critic, Role) and isinstance(trainer.reward.model, Role)
    assert isinstance(trainer.reference.model, Role)
    base = count(AutoModelForCausalLM.from_pretrained(world[1]))
    lora = sum(p.numel() for n, p in actor.policy.named_parameters() if "lora" in n)
    assert count(actor) == base + lora + 32
    assert count(trainer.reward.model) == count(actor.critic) == 32  # their heads
    trained = {n for n, p in actor.named_parameters() if p.requires_grad}
    assert all(".default." in n or ".critic." in n or "critic.score" in n for n in trained)
    groups = trainer.optimizer.param_groups
    assert sum(len(g["params"]) for g in groups) == len(trained)


def test_roles_score_as_models_of_their_own(world):
    _, _, rm, expected = world
    trainer = make(world)
    np.testing.assert_allclose(trainer.reward.score_ids(ROWS), expected, atol=2e-6)
    alone = RewardModel.load(rm, trainer.config)  # merged weights, transformers alone
    np.testing.assert_allclose(alone.score_ids(ROWS), expected, atol=1e-5)
    rollout = trainer.score(trainer.rollout(0))
    assert float(rollout.kl.abs().max()) < 1e-5  # a new adapter changes nothing
    with torch.no_grad():
        values = trainer.actor(rollout.ids, rollout.starts, rollout.mask, parts="values")
        raw = sequence_scores(alone.model, rollout.ids, rollout.starts)
    first = (raw - 0.5) / 2.0  # the critic starts from the reward model, on its scale
    torch.testing.assert_close(values[:, 0], first, atol=1e-5, rtol=1e-5)


def test_reward_and_reference_do_not_move_and_the_others_do(world):
    trainer = make(world, ppo__lr=1e-2, ppo__critic_lr=1e-2)
    before = {n: p.detach().clone() for n, p in trainer.actor.named_parameters()}
    rollout, _ = one_update(trainer)
    again = trainer.score(copy.copy(rollout))
    np.testing.assert_array_equal(again.rm_scores, rollout.rm_scores)
    torch.testing.assert_close(again.ref_logprobs, rollout.ref_logprobs, atol=0, rtol=0)
    moved = {n for n, p in trainer.actor.named_parameters() if not torch.equal(p, before[n])}
    assert {kind for n in moved for kind in ("default", "critic") if kind in n} == {
        "default",
        "critic",
    }
    assert not any("reward" in n or "base_layer" in n for n in moved)


def test_policy_and_critic_are_saved_without_anything_of_ours(world, tmp_path):
    trainer = make(world, ppo__lr=1e-2, ppo__critic_lr=1e-2)
    rollout, _ = one_update(trainer)
    actor, tokenizer = trainer.actor, trainer.tokenizer
    save_model(actor.policy, tokenizer, tmp_path / "policy")
    save_model(merged_critic(actor), tokenizer, tmp_path / "critic")
    ids = torch.tensor([ROWS[0]])
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    with torch.no_grad():
        want = actor.policy.eval()(ids).logits
        torch.testing.assert_close(policy(ids).logits, want, atol=1e-4, rtol=1e-4)
        critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
        want = sequence_scores(actor.critic, ids, torch.tensor([20]))
        torch.testing.assert_close(critic(ids).logits[0], want, atol=1e-4, rtol=1e-4)
    assert not any("lora" in n for n in policy.state_dict())
    assert rollout.mask.any()


def test_gradients_with_checkpointing_are_those_without(world):
    """The layers that the backward pass runs again see the adapter of their first run."""
    plain = make(world)
    saving = make(world, model__gradient_checkpointing=True)
    assert saving.actor.training
    calls = []
    inner = saving.actor.policy.get_base_model()
    layer = getattr(inner, inner.base_model_prefix).layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for trainer in (plain, saving):
        with torch.no_grad():  # both adapters must matter
            for name, p in trainer.actor.named_parameters():
                if "lora_B.default" in name:
                    p.copy_(torch.linspace(-0.1, 0.1, p.numel()).view_as(p))
        rollout = trainer.score(trainer.rollout(0))
        calls.clear()
        advantages = trainer.advantages(rollout)
        trainer.accelerator.clip_grad_norm_ = lambda *_: torch.zeros(())
        trainer.optimizer.step = lambda *_: None
        trainer.optimizer.zero_grad = lambda *_: None
        trainer.update(rollout, advantages)
    assert calls.count(True) == 8  # four parts of policy and critic, each once more
    other = dict(saving.actor.named_parameters())
    for name, p in plain.actor.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, other[name].grad, atol=1e-6, rtol=1e-5)


def test_half_precision_trunk_trains_adapters_in_float32(world):
    trainer = make(world, model__dtype="bfloat16")
    _, stats = one_update(trainer)
    assert np.isfinite(stats["policy_loss"]) and stats["grad_norm"] > 0
    groups = trainer.optimizer.param_groups
    assert {p.dtype for g in groups for p in g["params"]} == {torch.float32}
    assert next(trainer.actor.policy.parameters()).dtype == torch.bfloat16


def test_a_task_that_scores_itself_needs_no_reward_adapter(world):
    trainer = make(world, rm=False, ppo__reward="task", ppo__critic_init="zero")
    one_update(trainer)
    assert "reward" not in trainer.actor.policy.peft_config


def test_another_base_keeps_its_weights(world, tmp_path):
    _, sft, rm, _ = world
    assert on_trunk(rm, sft) and not on_trunk(sft, sft)
    tokenizer = make(world).tokenizer
    config = load_config("tldr-smoke", SMALL, {"model.lora.rank": 0})
    save_model(load_policy(config.model, tokenizer, seed=9), tokenizer, tmp_path)
    assert not on_trunk(rm, tmp_path)
    trainer = PPOTrainer(load_config("tldr-smoke", SMALL), world[0], tmp_path, rm)
    assert not isinstance(trainer.actor.critic, Role)
    assert (rm / ADAPTER / "adapter_config.json").is_file()


def test_adapters_switch_and_switch_back(world):
    policy = make(world).actor.policy
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        own = policy(ids).logits
        with adapters(policy, ["reward"]):
            other = policy(ids).logits
        torch.testing.assert_close(policy(ids).logits, own, atol=0, rtol=0)
    assert (own - other).abs().max() > 1e-3
