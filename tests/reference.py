"""The core once more in plain Python, one response and one token at a time: what the vectorised
code is compared with. Rows are lists; an off-mask token is False in `mask` and -1 in `segments`."""

import math


def segments_from_lengths(lengths, mask):
    """Ids for macro actions of the given lengths in turn; what is left over is the last one."""
    ids, current, taken = [], 0, 0
    remaining = list(lengths)
    for valid in mask:
        if not valid:
            ids.append(-1)
            continue
        if remaining and taken == remaining[0]:
            remaining.pop(0)
            current, taken = current + 1, 0
        ids.append(current)
        taken += 1
    return ids


def perplexity_segments(logprobs, mask, reading):
    """Spelled in perplexities, as App. B.4 is: a macro action ends where the next token raises it.
    (Compared in logs: exp is monotone.)"""
    ids, current, so_far, last = [], -1, [], None
    for logprob, valid in zip(logprobs, mask, strict=True):
        if not valid:
            ids.append(-1)
            continue
        loss = -logprob
        if not so_far:
            rises = True
        elif reading == "neighbour":
            rises = loss > last
        else:
            rises = math.fsum([*so_far, loss]) / (len(so_far) + 1) > mean(so_far)
        if rises:
            current, so_far = current + 1, []
        so_far.append(loss)
        last = loss
        ids.append(current)
    return ids


def mean(xs):
    return math.fsum(xs) / len(xs)


def macro_actions(segments):
    """[[token positions of macro action 0], [of 1], ...]"""
    groups = {}
    for position, segment in enumerate(segments):
        if segment >= 0:
            groups.setdefault(segment, []).append(position)
    return [groups[m] for m in sorted(groups)]


def sigma(length, weights, gamma=1.0):
    """Weights of the tokens of one macro action (App. D.1)."""
    if weights == "equal":
        return [1 / length] * length
    if weights == "unit":
        return [0.0] * (length - 1) + [1.0]
    if weights == "first":
        return [1.0] + [0.0] * (length - 1)
    if weights == "sum":
        return [1.0] * length
    if weights == "discounted":
        return [gamma**i for i in range(length)]
    if weights == "decay":
        raw = [1 / (length - i) for i in range(length)]
        return [w / math.fsum(raw) for w in raw]
    raise AssertionError(weights)


def pool(x, segments, weights, gamma=1.0):
    return [
        math.fsum(w * x[t] for w, t in zip(sigma(len(group), weights, gamma), group, strict=True))
        for group in macro_actions(segments)
    ]


def gae(rewards, values, lengths, gamma, lam):
    advantages = [0.0] * len(rewards)
    next_value = next_advantage = 0.0
    for m in reversed(range(len(rewards))):
        discount = gamma ** lengths[m]
        delta = rewards[m] + discount * next_value - values[m]
        advantages[m] = next_advantage = delta + discount * lam * next_advantage
        next_value = values[m]
    return advantages


def macro_gae(rewards, values, segments, gamma, lam, value_weights, reward_weights):
    """Advantages and returns of every token, 0 on padding."""
    groups = macro_actions(segments)
    macro_values = pool(values, segments, value_weights)
    macro_rewards = pool(rewards, segments, reward_weights, gamma)
    macro_advantages = gae(macro_rewards, macro_values, [len(g) for g in groups], gamma, lam)
    advantages, returns = [0.0] * len(segments), [0.0] * len(segments)
    for group, value, advantage in zip(groups, macro_values, macro_advantages, strict=True):
        for t in group:
            advantages[t], returns[t] = advantage, advantage + value
    return advantages, returns


def policy_loss(logprobs, old_logprobs, advantages, segments, clip, ratio):
    """Sum over a batch of rows, divided by its tokens."""
    total, tokens = 0.0, 0
    for new, old, advantage, row in zip(logprobs, old_logprobs, advantages, segments, strict=True):
        groups = macro_actions(row)
        tokens += sum(map(len, groups))
        if ratio == "token":
            groups = [[t] for group in groups for t in group]
        for group in groups:
            r = math.exp(math.fsum(new[t] - old[t] for t in group))
            a = mean([advantage[t] for t in group])
            total += min(r * a, min(max(r, 1 - clip), 1 + clip) * a)
    return -total / tokens


def value_loss(values, old_values, returns, mask, clip):
    total, tokens = 0.0, 0
    for row in zip(values, old_values, returns, mask, strict=True):
        for value, old, target, valid in zip(*row, strict=True):
            if valid:
                near = min(max(value, old - clip), old + clip)
                total += 0.5 * max((value - target) ** 2, (near - target) ** 2)
                tokens += 1
    return total / tokens


def token_rewards(score, kl, mask, kl_coef):
    rewards = [-kl_coef * k if valid else 0.0 for k, valid in zip(kl, mask, strict=True)]
    last = max((t for t, valid in enumerate(mask) if valid), default=None)
    if last is not None:
        rewards[last] += score
    return rewards
