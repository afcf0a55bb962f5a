"""Losses, token rewards and KL estimators: arrays worked out by hand, gradients by finite
differences, exact expectations by enumeration, micro-batches that add up, NaN in padding."""

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from marlhf.macro import macro_gae, pool, spread
from marlhf.objectives import (
    categorical_kl,
    explained_variance,
    kl_k1,
    kl_k2,
    kl_k3,
    masked_mean,
    masked_rms,
    policy_loss,
    policy_stats,
    token_rewards,
    value_loss,
    whiten,
)
from marlhf.segment import FixedNgram, Token, Whole

NAN = float("nan")


def tensor(*rows, dtype=torch.float32):
    return torch.tensor(rows, dtype=dtype)


def rollout(seed=0, rows=5, columns=12, drift=0.3, dtype=torch.float32):
    """Ragged logprobs, old_logprobs, advantages, mask, segments; NaN off the mask; advantages alike
    within a macro action, as macro_gae makes them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, columns + 1, (rows, 1), generator=generator)
    mask = torch.arange(columns) < lengths
    segments = FixedNgram(3)(mask, mask)
    old = -torch.rand(rows, columns, generator=generator, dtype=dtype) * 3
    logprobs = old + drift * torch.randn(rows, columns, generator=generator, dtype=dtype)
    macro = torch.randn(rows, columns, generator=generator, dtype=dtype)
    floats = (logprobs, old, spread(macro, segments))
    return *(x.masked_fill(~mask, NAN) for x in floats), mask, segments


def gradient(loss, x):
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


# policy_loss


def test_token_loss_by_hand():
    """Ratios 1.5, 0.5, 1.5, 0.5 with advantages 1, 1, -1, -1: clipped to 1.2, not to 0.8 (the
    minimum), not to 1.2, to 0.8. Sum 1.2 + 0.5 - 1.5 - 0.8 = -0.6 over 4 tokens."""
    old = tensor([-1.0, -1, -1, -1, NAN])
    logprobs = old + tensor([1.5, 0.5, 1.5, 0.5, 1]).log()
    advantages, mask = tensor([1.0, 1, -1, -1, NAN]), tensor([1, 1, 1, 1, 0], dtype=torch.bool)
    assert_close(policy_loss(logprobs, old, advantages, mask), torch.tensor(0.15))
    assert_close(policy_loss(logprobs, old, advantages, mask, clip=0.6), torch.tensor(0.0))


def test_macro_loss_by_hand():
    """Macro actions of 2 and 1 tokens: ratios 1.1 * 1.2 = 1.32 -> 1.2 and 0.5; advantages 2 and -1:
    2 * 1.2 - max(0.5, 0.8) = 1.6, over 3 tokens (not 2 macro actions)."""
    old = tensor([-1.0, -2, -1, NAN])
    logprobs = old + tensor([1.1, 1.2, 0.5, 1]).log()
    advantages, mask = tensor([2.0, 2, -1, NAN]), tensor([1, 1, 1, 0], dtype=torch.bool)
    segments = tensor([0, 0, 1, -1], dtype=torch.int64)
    loss = policy_loss(logprobs, old, advantages, mask, ratio="macro", segments=segments)
    assert_close(loss, torch.tensor(-1.6 / 3))


@given(st.integers(0, 10_000), st.sampled_from(["token", "macro"]), st.sampled_from([0.1, 0.2]))
@settings(max_examples=60, deadline=None)
def test_policy_loss_matches_reference(seed, ratio, clip):
    logprobs, old, advantages, mask, segments = rollout(seed)
    loss = policy_loss(logprobs, old, advantages, mask, clip, ratio, segments)
    rows = [each.tolist() for each in (logprobs, old, advantages, segments)]
    assert_close(loss.item(), reference.policy_loss(*rows, clip, ratio), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio", ["token", "macro"])
def test_policy_loss_gradient_by_finite_differences(ratio):
    """In double precision, padding of zeros (NaN has no difference); clipped and free terms."""
    logprobs, old, advantages, mask, segments = rollout(dtype=torch.float64)
    logprobs = logprobs.nan_to_num().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old, advantages, mask, 0.2, ratio, segments), logprobs
    )
    stats = policy_stats(logprobs, old, mask, 0.2, ratio, segments)
    assert 0.1 < stats["clip_fraction"] < 0.9  # both kinds are there


def test_macro_ratio_is_token_ratio_at_n_1():
    logprobs, old, advantages, mask, _ = rollout()
    logprobs.requires_grad_()
    segments = Token()(mask, mask)
    token = policy_loss(logprobs, old, advantages, mask)
    macro = policy_loss(logprobs, old, advantages, mask, ratio="macro", segments=segments)
    assert_close(macro, token)
    assert_close(gradient(macro, logprobs), gradient(token, logprobs))


@pytest.mark.parametrize("segmenter", [FixedNgram(3), FixedNgram(5), Whole()], ids=repr)
def test_ratio_one_gives_both_forms_the_policy_gradient(segmenter):
    """At ratio 1 the gradient of either is - A_t / tokens at each token."""
    _, old, _, mask, _ = rollout()
    segments = segmenter(mask, mask)
    macro = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    advantages = spread(macro, segments)
    logprobs = old.clone().requires_grad_()
    expected = -advantages / mask.sum()
    for ratio in ("token", "macro"):
        loss = policy_loss(logprobs, old, advantages, mask, ratio=ratio, segments=segments)
        assert_close(gradient(loss, logprobs), expected)


@pytest.mark.parametrize("ratio", ["token", "macro"])
def test_overflowing_ratio_has_gradient_zero_where_clipping_wins(ratio):
    """e^100 is no float32. With A > 0 the clipped term wins and must not bring 0 * inf."""
    old = torch.full((1, 4), -30.0)
    logprobs = torch.full((1, 4), 70.0, requires_grad=True)
    mask, segments = torch.ones(1, 4, dtype=bool), torch.zeros(1, 4, dtype=torch.int64)
    for advantage, expected in ((1.0, -1.2 if ratio == "token" else -0.3), (0.0, 0.0)):
        loss = policy_loss(
            logprobs, old, torch.full((1, 4), advantage), mask, ratio=ratio, segments=segments
        )
        assert_close(loss.item(), expected)
        assert (gradient(loss, logprobs) == 0).all()


def test_policy_loss_differentiates_logprobs_alone():
    logprobs, old, advantages, mask, segments = (
        each.clone().requires_grad_() if each.is_floating_point() else each for each in rollout()
    )
    policy_loss(logprobs, old, advantages, mask, 0.2, "macro", segments).backward()
    assert logprobs.grad is not None
    assert old.grad is None
    assert advantages.grad is None


def test_policy_loss_refuses_unknown_ratios():
    arguments = rollout()[:4]
    with pytest.raises(ValueError, match="there is no 'tokens'; choose 'token' or 'macro'"):
        policy_loss(*arguments, ratio="tokens")
    with pytest.raises(ValueError, match="'macro' needs segments"):
        policy_loss(*arguments, ratio="macro")


# value_loss


def test_value_loss_by_hand():
    """Old value 0, clip 0.2. Value 1, return 2: plain 1, clipped (0.2 - 2)^2 = 3.24, larger 3.24.
    Value 1, return 0: plain 1, clipped 0.04, larger 1. Value 0.1, return 1: 0.81 both.
    (3.24 + 1 + 0.81) / 2 / 3."""
    values, old = tensor([1.0, 1, 0.1, NAN]), tensor([0.0, 0, 0, NAN])
    returns, mask = tensor([2.0, 0, 1, NAN]), tensor([1, 1, 1, 0], dtype=torch.bool)
    assert_close(value_loss(values, old, returns, mask), torch.tensor(5.05 / 6))
    plain = value_loss(values, old, returns, mask, clip=math.inf)
    assert_close(plain, torch.tensor((1 + 1 + 0.81) / 6))


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_value_loss_matches_reference(seed):
    values, old, returns, mask, _ = rollout(seed)
    expected = reference.value_loss(*(x.tolist() for x in (values, old, returns, mask)), 0.2)
    assert_close(value_loss(values, old, returns, mask).item(), expected, rtol=1e-4, atol=1e-5)


def test_value_loss_gradient_by_finite_differences():
    values, old, returns, mask, _ = rollout(dtype=torch.float64)
    values = values.nan_to_num().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, returns, mask), values)


def test_value_loss_differentiates_values_alone():
    values, old, returns = (each.requires_grad_() for each in rollout()[:3])
    value_loss(values, old, returns, rollout()[3]).backward()
    assert values.grad is not None
    assert old.grad is None
    assert returns.grad is None


# What losses owe


def losses(logprobs, old, advantages, mask, segments, denominator=None):
    return [
        policy_loss(logprobs, old, advantages, mask, 0.2, "token", None, denominator),
        policy_loss(logprobs, old, advantages, mask, 0.2, "macro", segments, denominator),
        value_loss(logprobs, old, advantages, mask, 0.2, denominator),
    ]


def test_nan_in_padding_reaches_no_loss_and_no_gradient():
    logprobs, *rest, mask, segments = rollout()
    assert logprobs.isnan().any()
    logprobs.requires_grad_()
    clean = [each.nan_to_num(7.0) for each in (logprobs, *rest)]
    for loss, expected in zip(
        losses(logprobs, *rest, mask, segments), losses(*clean, mask, segments), strict=True
    ):
        assert loss.item() == expected.item()
        grad = gradient(loss, logprobs)
        assert grad.isfinite().all()
        assert (grad[~mask] == 0).all()
        assert (grad[mask] != 0).any()


def test_micro_batches_add_up_to_the_batch():
    """Ragged rows in pieces of 1, 2 and 2 with the batch's token count: same loss, same gradient,
    clip fraction and approximate KL. Means of the pieces' means would differ."""
    batch = rollout()
    batch[0].requires_grad_()
    tokens = batch[3].sum()
    pieces = [losses(*(x[rows] for x in batch), tokens) for rows in ([0], [1, 2], [3, 4])]
    means = [losses(*(x[rows] for x in batch)) for rows in ([0], [1, 2], [3, 4])]
    for whole, parts, wrong in zip(
        losses(*batch), zip(*pieces, strict=True), zip(*means, strict=True), strict=True
    ):
        assert_close(sum(parts), whole)
        assert_close(gradient(sum(parts), batch[0]), gradient(whole, batch[0]))
        assert abs(sum(wrong) / 3 - whole) > 1e-3
    whole = policy_stats(batch[0], batch[1], batch[3])
    parts = [
        policy_stats(batch[0][rows], batch[1][rows], batch[3][rows], denominator=tokens)
        for rows in ([0], [1, 2], [3, 4])
    ]
    for name in ("clip_fraction", "approx_kl"):
        assert_close(sum(part[name] for part in parts), whole[name])


def test_losses_ignore_batch_order_and_extra_padding():
    batch = rollout()
    order = [3, 1, 4, 0, 2]
    wide = [
        torch.nn.functional.pad(each, (2, 3), value=fill)
        for each, fill in zip(batch, (NAN, NAN, NAN, False, -1), strict=True)
    ]
    for loss, shuffled, wider in zip(
        losses(*batch), losses(*(x[order] for x in batch)), losses(*wide), strict=True
    ):
        assert_close(shuffled, loss)
        assert_close(wider, loss)


def test_bfloat16_in_float32_inside():
    batch = [x.bfloat16() if x.is_floating_point() else x for x in rollout()]
    wide = [x.float() if x.is_floating_point() else x for x in batch]
    for low, high in zip(losses(*batch), losses(*wide), strict=True):
        assert low.dtype == torch.float32
        assert torch.equal(low, high)
    kl, scores = batch[0], torch.ones(5, dtype=torch.bfloat16)
    assert token_rewards(scores, kl, batch[3], 0.05).dtype == torch.float32
    assert kl_k3(batch[0], batch[1]).dtype == torch.float32


def test_empty_batches_have_loss_zero():
    """No valid token in a micro-batch: 0, and no NaN in the gradient."""
    logprobs, old, advantages, mask, segments = rollout()
    logprobs.requires_grad_()
    mask, segments = torch.zeros_like(mask), torch.full_like(segments, -1)
    for loss in losses(logprobs, old, advantages, mask, segments):
        assert loss.item() == 0
        assert (gradient(loss, logprobs) == 0).all()


def test_host_never_waits_for_the_device():
    """A meta tensor has no contents: whatever needs them on the host raises."""
    x, mask = torch.zeros(3, 8, device="meta"), torch.ones(3, 8, dtype=torch.bool, device="meta")
    results = losses(x, x, x, mask, torch.zeros(3, 8, dtype=torch.int64, device="meta"))
    results += policy_stats(x, x, mask).values()
    results += [whiten(x, mask), explained_variance(x, x, mask), token_rewards(x[:, 0], x, mask, 1)]
    assert all(result.device.type == "meta" for result in results)


# policy_stats


def test_policy_stats_by_hand():
    old = tensor([-1.0, -1, -1, -1, NAN])
    ratios = tensor([1.5, 0.9, 1.1, 0.4, 1])
    mask = tensor([1, 1, 1, 1, 0], dtype=torch.bool)
    logprobs = old + ratios.log()

    def stats(**options):
        return {k: v.item() for k, v in policy_stats(logprobs, old, mask, **options).items()}

    kl = sum(r - 1 - math.log(r) for r in (1.5, 0.9, 1.1, 0.4)) / 4
    assert_close(stats(), {"clip_fraction": 0.5, "approx_kl": kl, "ratio_max": 1.5})
    # Macro ratios: 1.5 * 0.9 * 1.1 = 1.485 for three tokens, 0.4 for one.
    macro = {"ratio": "macro", "segments": tensor([0, 0, 0, 1, -1], dtype=torch.int64)}
    expected = {"clip_fraction": 0.25, "approx_kl": kl, "ratio_max": 1.485}
    assert_close(stats(clip=0.5, **macro), expected)
    assert_close(stats(clip=0.4, **macro), {**expected, "clip_fraction": 1.0})


def test_largest_ratio_is_not_paddings():
    """Padding has log-ratio 0, so ratio 1, which is above every valid one here."""
    mask = tensor([1, 0], dtype=torch.bool)
    old, segments = tensor([-1.0, NAN]), tensor([0, -1], dtype=torch.int64)
    for ratio in ("token", "macro"):
        stats = policy_stats(old - 1, old, mask, ratio=ratio, segments=segments)
        assert_close(stats["ratio_max"].item(), math.exp(-1))


# token_rewards


def test_final_reward_stands_at_the_last_valid_token():
    mask = tensor([1, 1, 1, 0], [0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], dtype=torch.bool)
    kl = torch.full((4, 4), 0.5).masked_fill(~mask, NAN)
    rewards = token_rewards(torch.tensor([1.0, 2.0, 3.0, NAN]), kl, mask, kl_coef=0.2)
    expected = [[-0.1, -0.1, 0.9, 0], [0, -0.1, 0, 1.9], [-0.1, -0.1, -0.1, 2.9], [0, 0, 0, 0]]
    assert_close(rewards, torch.tensor(expected))


def test_kl_costs_reward():
    """A policy more sure of its token than the reference pays for it."""
    kl = kl_k1(tensor([-0.1]), tensor([-2.0]))
    rewards = token_rewards(torch.zeros(1), kl, torch.ones(1, 1), kl_coef=0.05)
    assert_close(rewards, tensor([-0.05 * 1.9]))


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_token_rewards_match_reference(seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, 9, generator=generator) < 0.6
    kl = torch.randn(4, 9, generator=generator).masked_fill(~mask, NAN)
    scores = torch.randn(4, generator=generator)
    expected = [
        reference.token_rewards(*row, 0.05)
        for row in zip(scores.tolist(), kl.tolist(), mask.tolist(), strict=True)
    ]
    assert_close(token_rewards(scores, kl, mask, 0.05), torch.tensor(expected))


def test_rewards_sum_to_the_objective_and_survive_pooling():
    """score - kl_coef * sum of KL, token by token as macro action by macro action."""
    logprobs, ref, _, mask, segments = rollout()
    kl, scores = kl_k1(logprobs, ref), torch.randn(5)
    rewards = token_rewards(scores, kl, mask, 0.05)
    expected = scores - 0.05 * torch.where(mask, kl, 0).sum(1)
    assert_close(rewards.sum(1), expected)
    assert_close(pool(rewards, segments, "sum").sum(1), expected)


# KL, by enumeration


@pytest.fixture
def two_policies():
    generator = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(2, 7, 11, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), ref.log_softmax(-1)


def test_categorical_kl_against_torch(two_policies):
    logprobs, ref = two_policies[0].log_softmax(-1), two_policies[1]
    expected = torch.nn.functional.kl_div(ref, logprobs, log_target=True, reduction="none").sum(-1)
    assert_close(categorical_kl(logprobs, ref), expected)
    assert (expected > 0).all()


def test_estimators_in_expectation_are_the_kl(two_policies):
    """sum_a pi(a) estimate(a): k1 and k3 are the KL exactly, k2 only nearly and only nearby."""
    logits, ref = two_policies
    kl_at = {}
    for name, scale in (("far", 1.0), ("near", 0.01)):
        logprobs = (ref + scale * (logits - ref)).log_softmax(-1)
        exact = categorical_kl(logprobs, ref)
        expected = {k: (logprobs.exp() * k(logprobs, ref)).sum(-1) for k in (kl_k1, kl_k2, kl_k3)}
        assert_close(expected[kl_k1], exact)
        assert_close(expected[kl_k3], exact)
        kl_at[name] = ((expected[kl_k2] - exact) / exact).abs().max()
    assert kl_at["near"] < 0.02
    assert kl_at["far"] > 0.1


def test_estimators_signs(two_policies):
    logprobs, ref = two_policies[0].log_softmax(-1), two_policies[1]
    assert (kl_k1(logprobs, ref) < 0).any()
    assert (kl_k2(logprobs, ref) >= 0).all()
    assert (kl_k3(logprobs, ref) >= 0).all()


def test_estimators_expected_gradients(two_policies):
    """sum_a pi(a) grad estimate(a), pi(a) held fixed as it is when tokens are sampled: k1 gives 0,
    k2 the gradient of KL(pi || pi_ref), k3 that of KL(pi_ref || pi), as the docstrings say."""
    logits, ref = two_policies
    logprobs = logits.log_softmax(-1)
    forward = gradient(categorical_kl(ref, logits.log_softmax(-1)).sum(), logits)
    backward = gradient(categorical_kl(logits.log_softmax(-1), ref).sum(), logits)
    for estimate, expected in (
        (kl_k1, torch.zeros_like(logits)),
        (kl_k2, backward),
        (kl_k3, forward),
    ):
        sampled = (logprobs.exp().detach() * estimate(logits.log_softmax(-1), ref)).sum()
        assert_close(gradient(sampled, logits), expected)
    assert (forward - backward).abs().max() > 0.1


def test_categorical_kl_over_a_truncated_policy():
    """Actions outside the top k have pi(a) = 0 and add nothing, also where pi_ref(a) = 0."""
    logprobs = tensor([0.5, 0.5, 0.0, 0.0]).log().requires_grad_()
    ref = tensor([0.25, 0.25, 0.5, 0.0]).log()
    kl = categorical_kl(logprobs, ref)
    assert_close(kl, torch.tensor([math.log(2)]))
    assert gradient(kl.sum(), logprobs).isfinite().all()


# Means and friends


def test_masked_mean_and_rms_by_hand():
    x, mask = tensor([3.0, 4, NAN], [5, NAN, NAN]), tensor([1, 1, 0], [1, 0, 0], dtype=torch.bool)
    assert_close(masked_mean(x, mask), torch.tensor(4.0))  # over tokens, not over rows (4.25)
    assert_close(masked_mean(x, mask, 6), torch.tensor(2.0))
    assert_close(masked_rms(x, mask), torch.tensor((50 / 3) ** 0.5))
    assert masked_mean(x, torch.zeros_like(mask)) == 0


def test_whiten():
    _, _, advantages, mask, _ = rollout()
    white = whiten(100 + 7 * advantages, mask)
    assert (white[~mask] == 0).all()
    assert_close(white[mask].mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    assert_close(white[mask].std(unbiased=False), torch.tensor(1.0))
    centred = advantages[mask] - advantages[mask].mean()
    assert_close(white[mask], centred / centred.std(unbiased=False), rtol=1e-4, atol=1e-4)
    assert (whiten(torch.ones(2, 3), torch.ones(2, 3)) == 0).all()


def test_explained_variance():
    returns, mask = tensor([1.0, 2, 3, NAN]), tensor([1, 1, 1, 0], dtype=torch.bool)

    def ev(*values):
        return explained_variance(tensor([*values, NAN]), returns, mask).item()

    assert ev(6.0, 7, 8) == 1.0  # a constant offset is not held against it
    assert ev(5.0, 5, 5) == 0.0
    assert_close(ev(3.0, 2, 1), -3.0)  # residuals -2, 0, 2: variance 8/3 over 2/3
    assert math.isnan(explained_variance(returns, torch.ones(1, 4), mask).item())


def test_explained_variance_of_macro_returns():
    """The returns that the critic regresses on are per token: it is their variance that counts."""
    rewards, values = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 10, dtype=bool)
    _, returns = macro_gae(rewards, values, FixedNgram(5)(mask, mask))
    expected = 1 - (returns - values).var() / returns.var()
    assert_close(explained_variance(values, returns, mask), expected)
