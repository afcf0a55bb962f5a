"""Models: logits, values and scores in the right places, whatever the padding; saving, loading."""

import copy

import pytest
import torch
import transformers
from tinymodels import CONFIGS, PROMPTS, RESPONSES, TOLERANCE, make, packed, scalar
from torch import nn

from marlhf import models
from marlhf.config import ModelConfig, load_config
from marlhf.models import (
    ActorCritic,
    Reference,
    backbone_of,
    gather_logprobs,
    hidden_at,
    is_lora,
    load_policy,
    load_scalar,
    position_ids,
    response_hidden,
    response_logits,
    response_tokens,
    save_model,
    sequence_scores,
    tiny_config,
    token_logprobs,
    token_values,
    unravel,
)
from marlhf.roles import disable_dropout
from marlhf.text import right_pad, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat is in the post", "the dog saw the cow"] * 3, 300)


@pytest.fixture(scope="module")
def config():
    return load_config("tldr-smoke", {"model.tiny.hidden": 32, "model.tiny.ff": 48}).model


# Where things stand


def test_position_ids_count_valid_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_pack_joins_prompt_and_response_without_a_gap():
    ids, starts, tokens, mask = packed([[5, 6], [7, 8, 9]], [[20, 21, 1], [22]], pad=50)
    assert ids.tolist() == [[5, 6, 20, 21, 1], [7, 8, 9, 22, 50]]
    assert starts.tolist() == [2, 3]
    assert response_tokens(ids, starts, 3)[mask].tolist() == tokens[mask].tolist()


def test_pack_keeps_tokens_that_equal_the_padding():
    ids, starts, *_ = packed([[1, 6], [7]], [[1, 1], [22]], pad=1)
    assert ids.tolist() == [[1, 6, 1, 1], [7, 22, 1, 1]]
    assert starts.tolist() == [2, 1]


@pytest.mark.parametrize("arch", CONFIGS)
def test_response_logits_are_the_models_own(arch):
    model = make(arch)
    ids, starts, _, mask = packed()
    got = response_logits(model, ids, starts, mask).split([len(r) for r in RESPONSES])
    for prompt, response, found in zip(PROMPTS, RESPONSES, got, strict=True):
        own = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        assert own.std() > 0.1
        torch.testing.assert_close(found, own, atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("arch", CONFIGS)
def test_scores_are_transformers_own_and_values_end_with_them(arch):
    model = scalar(arch)
    rows = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    ids, mask = right_pad(rows, 0)
    scores = sequence_scores(model, ids, mask.sum(1))
    for row, score in zip(rows, scores, strict=True):
        own = model(torch.tensor([row]), attention_mask=torch.ones(1, len(row))).logits
        torch.testing.assert_close(score, own[0, 0], atol=TOLERANCE, rtol=1e-4)
    # V(s_t) is read before token t: after the last but one token stands the value of the last
    ids, starts, _, mask = packed()
    values = token_values(model, ids, starts, mask)
    for i, response in enumerate(RESPONSES):
        before = torch.tensor([PROMPTS[i] + response[:-1]])
        score = sequence_scores(model, before, torch.tensor([before.shape[1]]))
        torch.testing.assert_close(values[i, len(response) - 1], score[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arch", CONFIGS)
def test_the_last_feed_forward_part_runs_only_where_it_is_read(arch):
    model = make(arch)
    backbone, ids = backbone_of(model), torch.tensor([[2, 3, 4, 5, 6], [7, 8, 9, 2, 3]])
    places = torch.tensor([3, 4, 7])
    mlp, seen = getattr(getattr(backbone, "layers", [None])[-1], "mlp", None), []
    if mlp is not None:
        mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    whole = backbone(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[places]
    found = hidden_at(backbone, ids, places)
    torch.testing.assert_close(found, whole, atol=TOLERANCE, rtol=1e-4)
    grads = [
        torch.autograd.grad(x.square().sum(), list(backbone.parameters()), allow_unused=True)
        for x in (found, whole)
    ]
    for one, other in zip(*grads, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    assert seen == ([10, 3] if mlp is not None else [])
    again = backbone(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[places]
    assert torch.equal(again, whole)  # outside, the model is as it was


@pytest.mark.parametrize("kept", [False, True])
def test_logprobs_chunk_by_chunk_are_the_same(monkeypatch, kept):
    """Values and gradients, whatever the chunk; no more logits than allowed are there at once."""
    model = make("gemma2")
    ids, starts, tokens, mask = packed()
    hidden, tokens = response_hidden(backbone_of(model), ids, starts, mask).detach(), tokens[mask]
    kept = torch.stack([tokens, (tokens + 1) % 60, (tokens + 2) % 60], 1) if kept else None
    made, sizes = [], []
    original = models.output_logits
    monkeypatch.setattr(
        models, "output_logits", lambda m, h: sizes.append(len(h)) or original(m, h)
    )
    for most in (2**26, 4 * model.config.vocab_size):
        monkeypatch.setattr(models, "LOGITS", most)
        states = hidden.clone().requires_grad_()
        logprobs, entropies = token_logprobs(model, states, tokens, 0.8, kept, entropy=True)
        logprobs.square().sum().backward()
        assert not entropies.requires_grad
        made.append((logprobs, entropies, states.grad))
    assert sizes[0] == len(tokens) and max(sizes[1:]) == 4
    for whole, parts in zip(*made, strict=True):
        torch.testing.assert_close(parts, whole)


# Padding and batch order


def logprobs_of(policy, ids, starts, tokens, mask):
    found = gather_logprobs(response_logits(policy, ids, starts, mask), tokens[mask])
    return unravel(found, mask)


@pytest.mark.parametrize("arch", CONFIGS)
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1]])
def test_padding_and_batch_order_change_nothing(arch, order):
    """Log-probabilities, values and scores to 2e-5 in float32."""
    policy, critic = make(arch), scalar(arch)
    ids, starts, tokens, mask = packed()
    logprobs = logprobs_of(policy, ids, starts, tokens, mask)
    values, scores = token_values(critic, ids, starts, mask), sequence_scores(critic, ids, starts)

    some = packed([PROMPTS[i] for i in order], [RESPONSES[i] for i in order], pad=59)
    wide = nn.functional.pad(some[0], (0, 5), value=33)  # padding of another length and id
    again = logprobs_of(policy, wide, *some[1:])
    for got, want in ((again, logprobs), (token_values(critic, wide, some[1], some[3]), values)):
        for row, i in enumerate(order):
            n = len(RESPONSES[i])
            torch.testing.assert_close(got[row, :n], want[i, :n], atol=TOLERANCE, rtol=1e-4)
    rescored = sequence_scores(critic, wide, some[1])
    torch.testing.assert_close(rescored, scores[order], atol=TOLERANCE, rtol=1e-4)


def test_no_gradient_from_what_is_padding():
    model = make("llama")
    ids, starts, _, mask = packed()
    ids[~(torch.arange(ids.shape[1]) < (starts + mask.sum(1))[:, None])] = 40  # padding alone
    response_logits(model, ids, starts, mask).square().sum().backward()
    rows = model.get_input_embeddings().weight.grad.abs().sum(1)
    assert rows[40] == 0
    assert rows[5] > 0


# Distributions


def test_gather_logprobs_by_hand():
    logits = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]])
    tokens = torch.tensor([[2]])
    want = 2 / 0.5 - torch.tensor([0.0, 2.0, 4.0, 6.0]).logsumexp(0)
    assert gather_logprobs(logits, tokens, 0.5).item() == pytest.approx(want.item(), abs=1e-6)
    kept = torch.tensor([[[3, 2]]])  # over the kept ids alone: e^2 / (e^2 + e^3)
    want = 2 - torch.tensor([2.0, 3.0]).logsumexp(0)
    assert gather_logprobs(logits, tokens, 1.0, kept).item() == pytest.approx(want.item(), abs=1e-6)


def test_bfloat16_logits_are_reduced_in_float32():
    logits = torch.randn(2, 3, 40).bfloat16()
    tokens = torch.randint(40, (2, 3))
    got = gather_logprobs(logits, tokens)
    assert got.dtype == torch.float32
    assert torch.equal(got, gather_logprobs(logits.float(), tokens))


# Loading and saving


@pytest.mark.parametrize("arch", ["llama", "gemma"])
def test_tiny_model_is_drawn_from_its_seed_wide_enough_to_copy(arch, config, tokenizer):
    config = copy.deepcopy(config)
    config.tiny.arch = arch
    one, same, other = (load_policy(config, tokenizer, seed=seed) for seed in (3, 3, 4))
    weights = [model.get_input_embeddings().weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].std().item() == pytest.approx(32**-0.5, rel=0.05)
    assert one.get_output_embeddings().weight is one.get_input_embeddings().weight


def test_saved_policy_loads_with_transformers_alone(config, tokenizer, tmp_path):
    policy = load_policy(config, tokenizer).eval()
    save_model(policy, tokenizer, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[2, 3, 4, 5]])
    assert torch.equal(loaded(ids).logits, policy(ids).logits)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert words.encode("the cat") == tokenizer.encode("the cat")
    assert words.eos_token_id == tokenizer.eos_token_id
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_scalar_keeps_the_backbone_and_its_head_survives_saving(config, tokenizer, tmp_path):
    policy = load_policy(config, tokenizer)
    save_model(policy, tokenizer, tmp_path / "policy")
    one, same = (load_scalar(config, tokenizer, tmp_path / "policy", seed=1) for _ in range(2))
    assert torch.equal(one.score.weight, same.score.weight)
    assert torch.equal(one.model.embed_tokens.weight, policy.model.embed_tokens.weight)
    save_model(one, tokenizer, tmp_path / "scalar")
    auto = transformers.AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path / "scalar").eval()
    ids = torch.tensor([[2, 3, 4, 5]])
    score = sequence_scores(one.eval(), ids, torch.tensor([4]))
    torch.testing.assert_close(loaded(ids).logits[0], score, atol=TOLERANCE, rtol=1e-4)


def test_zero_head_values_everything_at_zero(config, tokenizer, tmp_path):
    save_model(load_policy(config, tokenizer), tokenizer, tmp_path)
    critic = load_scalar(config, tokenizer, tmp_path, zero_head=True)
    ids, starts, _, mask = packed()
    values = token_values(critic, ids, starts, mask)
    assert (values == 0).all()
    values.sum().backward()
    assert critic.score.weight.grad.abs().sum() > 0  # and learns


def test_folder_without_a_model_is_one_error(config, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no model in this folder"):
        load_policy(config, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="no model in this folder"):
        load_scalar(config, tokenizer, tmp_path / "absent")


def test_folder_with_broken_weights_is_one_error(config, tokenizer, tmp_path):
    save_model(load_policy(config, tokenizer), tokenizer, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot load model"):
        load_policy(config, tokenizer, tmp_path)


def test_tokenizer_larger_than_the_model_is_one_error(config, tokenizer, tmp_path):
    save_model(load_policy(config, tokenizer), tokenizer, tmp_path)
    larger = train_tokenizer(["some more words than there are rows"] * 3, 310)
    larger.add_tokens([f"<{i}>" for i in range(80)])
    for load in (load_policy, load_scalar):
        with pytest.raises(ValueError, match="the tokenizer's largest id is"):
            load(config, larger, tmp_path)


def test_unknown_dtype_and_shape_are_errors(config, tokenizer):
    with pytest.raises(ValueError, match="float13"):
        load_policy(ModelConfig(dtype="float13"), tokenizer)
    wrong = copy.deepcopy(config)
    wrong.tiny.arch = "mamba"
    with pytest.raises(ValueError, match="llama, gemma"):
        tiny_config(wrong, 300, 1, 0)


def test_bfloat16_weights_give_float32_numbers(config, tokenizer, tmp_path):
    config = copy.deepcopy(config)
    config.dtype = "bfloat16"
    policy = load_policy(config, tokenizer)
    save_model(policy, tokenizer, tmp_path)
    critic = load_scalar(config, tokenizer, tmp_path)
    ids, starts, tokens, mask = packed()
    logits = response_logits(policy, ids, starts, mask)
    assert logits.dtype == torch.bfloat16
    assert gather_logprobs(logits, tokens[mask]).dtype == torch.float32
    assert token_values(critic, ids, starts, mask).dtype == torch.float32
    assert sequence_scores(critic, ids, starts).dtype == torch.float32


def test_gradient_checkpointing_changes_no_gradient(config, tokenizer):
    ids, starts, _, mask = packed()
    gradients = []
    for on in (False, True):
        config = copy.deepcopy(config)
        config.gradient_checkpointing = on
        model = load_policy(config, tokenizer).train()
        response_logits(model, ids, starts, mask).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


# LoRA


def lora(config):
    config = copy.deepcopy(config)
    config.lora.rank = 4
    return config


def disturb(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name or "score" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


def test_lora_adapter_off_is_the_base(config, tokenizer):
    base = load_policy(config, tokenizer).eval()
    policy = load_policy(lora(config), tokenizer).eval()
    ids, starts, tokens, mask = packed()
    want = response_logits(base, ids, starts, mask)
    assert is_lora(policy)
    torch.testing.assert_close(response_logits(policy, ids, starts, mask), want)  # B starts at zero
    disturb(policy)
    reference = Reference(policy)
    assert reference.model is policy  # no second copy in memory
    (found,) = reference.logprobs(ids, starts, tokens, mask, 1.0)
    torch.testing.assert_close(found[mask], gather_logprobs(want, tokens[mask]))
    assert (response_logits(policy, ids, starts, mask) - want).abs().max() > 1e-3
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)


def test_lora_is_merged_when_saved_and_goes_on_training(config, tokenizer, tmp_path):
    ids = torch.tensor([[2, 3, 4, 5]])
    policy = load_policy(lora(config), tokenizer).eval()
    disturb(policy)
    save_model(policy, tokenizer, tmp_path / "policy")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    torch.testing.assert_close(loaded(ids).logits, policy(ids).logits, atol=TOLERANCE, rtol=1e-4)
    assert not list((tmp_path / "policy").glob("adapter*"))
    assert is_lora(policy)  # the one in memory is as it was

    critic = load_scalar(lora(config), tokenizer, tmp_path / "policy").eval()
    assert any("score" in n for n, p in critic.named_parameters() if p.requires_grad)
    disturb(critic)
    save_model(critic, tokenizer, tmp_path / "critic")
    auto = transformers.AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path / "critic").eval()
    want = sequence_scores(critic, ids, torch.tensor([4]))
    torch.testing.assert_close(loaded(ids).logits[0], want, atol=TOLERANCE, rtol=1e-4)


# Policy and critic together


def test_reference_is_a_frozen_copy():
    policy = make("llama")
    ids, starts, tokens, mask = packed()
    reference = Reference(policy)
    want = reference.logprobs(ids, starts, tokens, mask, 1.0, 0.5)
    logits = response_logits(policy, ids, starts, mask)
    torch.testing.assert_close(want[1][mask], gather_logprobs(logits, tokens[mask], 0.5))
    assert all((x[~mask] == 0).all() for x in want)
    with torch.no_grad():
        policy.get_input_embeddings().weight.add_(1.0)
    again = reference.logprobs(ids, starts, tokens, mask, 1.0, 0.5)
    assert all(torch.equal(x, y) for x, y in zip(again, want, strict=True))
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert all(p.requires_grad for p in policy.parameters())


def test_actor_critic_is_its_parts():
    policy, critic = make("llama"), scalar("llama")
    both = ActorCritic(policy, critic, value_shift=-2.0, value_scale=0.5)
    ids, starts, tokens, mask = packed()
    logprobs, values, entropies = both(ids, starts, mask, 0.8)
    logits = response_logits(policy, ids, starts, mask)
    torch.testing.assert_close(logprobs[mask], gather_logprobs(logits, tokens[mask], 0.8))
    own = torch.distributions.Categorical(logits=logits / 0.8).entropy()
    torch.testing.assert_close(entropies[mask], own)
    assert all((x[~mask] == 0).all() for x in (logprobs, values, entropies))
    assert not entropies.requires_grad
    kept = torch.zeros(*mask.shape, 5, dtype=torch.long)
    kept[mask] = logits.topk(5).indices
    kept[..., 0] = tokens
    over_five = both(ids, starts, mask, 0.8, kept)[0]
    want = gather_logprobs(logits, tokens[mask], 0.8, kept[mask])
    torch.testing.assert_close(over_five[mask], want)
    want = torch.where(mask, 0.5 * token_values(critic, ids, starts, mask) - 2, 0.0)
    assert torch.equal(values, want)
    assert torch.equal(both(ids, starts, mask, parts="values"), want)


def test_parameter_groups_hold_every_parameter_once():
    both = ActorCritic(make("llama"), scalar("llama"))
    policy, critic = both.parameter_groups(1e-3, 2e-3, 0.1)
    assert (policy["lr"], critic["lr"]) == (1e-3, 2e-3)
    grouped = [id(p) for group in (policy, critic) for p in group["params"]]
    assert sorted(grouped) == sorted({id(p) for p in both.parameters()})


def test_disable_dropout_makes_training_mode_deterministic():
    model = make("gpt2").train()
    ids = torch.tensor([[2, 3, 4, 5]])
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
