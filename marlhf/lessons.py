"""What the lesson notebooks share: checks of exercises, and sliders with a static fallback.

A check tries the reader's function and returns a `Verdict`: passed, or a hint that is not the
answer. An error in the reader's function is a verdict too, never a traceback. One section a lesson;
pictures are in `marlhf.drawings`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from marlhf import chain as chains
from marlhf import macro
from marlhf.chain import Estimator
from marlhf.objectives import policy_loss, token_rewards
from marlhf.segment import FixedNgram, Perplexity, check_segments

# ---- every lesson ----


@dataclass(frozen=True)
class Verdict:
    """True if the exercise is solved; shows its text."""

    passed: bool
    text: str

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return f"{'Solved.' if self.passed else 'Not yet.'} {self.text}"


def judge(fault: Callable[[], str | None], praise: str) -> Verdict:
    """`fault` tries the reader's work and returns a hint, or None if there is nothing to mend."""
    try:
        hint = fault()
    except Exception as error:  # whatever the reader's function does
        return Verdict(False, f"It raised {type(error).__name__}: {error}")
    return Verdict(hint is None, praise if hint is None else hint)


def explore(draw: Callable[..., object], **controls) -> None:
    """Shows draw(name=value, ...), a picture or HTML, with the controls (ipywidgets) under it;
    moving one redraws it. Without a front end (GitHub, nbval, papermill) it stands still."""
    import ipywidgets
    from IPython.display import display

    def drawing():
        return draw(**{name: control.value for name, control in controls.items()})

    shown = display(drawing(), display_id=True)

    def redraw(_):
        if shown is not None:
            shown.update(drawing())

    for control in controls.values():
        control.observe(redraw, names="value")
    display(ipywidgets.VBox(list(controls.values())))


# ---- lesson 1: credit on an exact chain ----


def check_matched_lambda(matched_lambda: Callable[[float, int], float]) -> Verdict:
    """matched_lambda(lam, n): the token lambda with the horizon of lam over steps of n tokens."""

    def fault():
        for lam, n in ((0.95, 1), (0.95, 5), (0.8, 3), (1.0, 10)):
            kept = float(matched_lambda(lam, n)) ** n
            if not math.isclose(kept, lam, rel_tol=1e-9):
                return (
                    f"Macro actions of {n} at λ = {lam} keep {lam:.3f} of the credit over {n} "
                    f"tokens; {n} token steps at your λ keep {kept:.3f}."
                )
        return None

    return judge(fault, "Token GAE with this λ looks as far ahead.")


def check_credit_shares(credit_shares: Callable[[int, str], list]) -> Verdict:
    """credit_shares(n, weights): the share of its advantage that token 0, 1, ..., n - 1 of a macro
    action gets on average from an exact critic; compared with an exact chain."""
    example = chains.weighted_chain([1, 2, 1, 3, 1, 1, 2, 1, 1, 1, 1, 1])
    critic = chains.make_critic(example)

    def fault():
        for weights in ("first", "equal", "unit", "decay"):
            for n in (3, 4, 6):
                exact = chains.credit_shares(example, critic, Estimator(n, 0.95, weights))[:n]
                share = torch.as_tensor(credit_shares(n, weights), dtype=torch.float64)
                if share.shape != (n,):
                    return f"One number for each of the {n} tokens, please; got {share.tolist()}."
                if not torch.allclose(share, exact, atol=1e-6):
                    worst = int((share - exact).abs().argmax())
                    return (
                        f"'{weights}', n = {n}: token {worst} is furthest off. Go through the "
                        "values that are averaged: which were taken before that token was chosen, "
                        "and which already know it?"
                    )
        return None

    return judge(fault, "All four value weights, as the exact chain has them.")


def check_unbiased(estimate: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Verdict:
    """estimate(rewards, values, segments, lam) -> advantages [B, T]: macro-GAE whose gradient is
    right on average with an exact critic, tried on all responses of an eight-token chain."""
    example = chains.weighted_chain([1, 2, 1, 3, 1, 1, 2, 1])
    everything = chains.every_response(example)
    rewards = torch.zeros(everything.actions.shape, dtype=torch.float64)
    rewards[:, -1] = example.reward[everything.states[:, -1]]
    segments = FixedNgram(3)(rewards, torch.ones_like(rewards, dtype=torch.bool))

    def advantages(informed):
        critic = chains.make_critic(example, informed) + 0.5 * (1 - informed)
        values = critic[torch.arange(example.tokens), everything.states[:, :-1]]
        return estimate(rewards, values, segments, 0.9), values

    def fault():
        found, values = advantages(informed=0.0)
        wanted, _ = macro.macro_gae(rewards, values, segments, 1.0, 0.9)
        if found.shape != wanted.shape or not torch.allclose(found, wanted):
            return (
                "With a constant critic all baselines are equal, so yours must still give "
                "macro_gae's advantages there. Keep the macro actions; change the baseline only."
            )
        found, _ = advantages(informed=1.0)
        gradient = everything.share @ ((everything.actions - example.p) * found)
        cosine = torch.cosine_similarity(gradient, chains.policy_gradient(example), dim=0)
        if cosine < 1 - 1e-9:
            return (
                f"With an exact critic its cosine with the true gradient is {cosine:.3f}. Of the "
                "two things that macro_gae hands back, one has no baseline in it yet. Or change "
                "which state the baseline is the value of."
            )
        return None

    return judge(fault, "Unbiased with an exact critic, and still macro actions.")


# ---- lesson 2: where a macro action ends ----


def check_starts(starts: Callable[[list[float]], list[bool]]) -> Verdict:
    """starts(losses): does a macro action start at this token? Cumulative perplexity, App. B.4."""

    def fault():
        for losses in (
            *([1.0, 2.0], [5.0, 4.0, 3.0, 6.0, 2.0], [2.0, 2.0, 2.0]),
            *([3.0, 0.5, 1.0, 1.4, 1.5, 1.6], [1.0, 3.0, 2.5, 2.9]),
        ):
            found = [bool(x) for x in starts(list(losses))]
            if len(found) != len(losses):
                return f"One answer a token: {len(losses)} losses gave {len(found)} answers."
            if not found[0]:
                return "The first token of a response starts a macro action, whatever its loss."
            row = torch.tensor([losses])
            ids = Perplexity()(row, row > 0, ref_logprobs=-row)[0]
            wrong = [t for t in range(1, len(losses)) if found[t] != (ids[t] != ids[t - 1])]
            if wrong:
                return (
                    f"Losses {losses}, token {wrong[0]}: what is the perplexity of the macro "
                    "action so far, without this token and with it? (A tie is no rise, and a new "
                    "macro action has a past of its own.)"
                )
        return None

    return judge(fault, "It grows while the perplexity does not rise.")


def check_words(words: Callable[[Tensor, Tensor, int], Tensor]) -> Verdict:
    """words(begins, mask, n) -> segments [B, T]: macro actions of n words, however many tokens;
    begins [B, T] is true where a token begins a word."""
    begins = torch.tensor(
        [[1, 0, 1, 1, 0, 0, 1, 1], [1, 1, 0, 1, 1, 0, 1, 1], [1, 0, 0, 1, 1, 0, 0, 0]]
    ).bool()
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 7 + [0]]).bool()

    def fault():
        for n in (1, 2, 3):
            found = words(begins.clone(), mask.clone(), n)
            check_segments(found, mask)  # what it raises says what is wrong
            for row in range(len(mask)):
                wanted = torch.where(mask[row], (begins[row].cumsum(0) - 1) // n, -1)
                wrong = (found[row] != wanted).nonzero().flatten().tolist()
                if wrong:
                    return (
                        f"n = {n}, row {row}: {found[row].tolist()} for words that begin at "
                        f"{begins[row].nonzero().flatten().tolist()}. Token {wrong[0]} should be "
                        f"in macro action {int(wanted[wrong[0]])}; how many words began before it?"
                    )
        return None

    return judge(fault, "Macro actions of n words, in a batch, with padding.")


def check_reach(reach: Callable[[Tensor, float], Tensor]) -> Verdict:
    """reach(segments, lam) -> [B]: the share of the last macro action's TD error that is in the
    first token's advantage."""
    segments = torch.tensor(
        [[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1], [0, 0, 1, 2, -1, -1], [0, 0, 0, 0, 0, -1]]
    )

    def fault():
        for lam in (0.95, 0.5):
            wanted = lam ** segments.amax(1).float()
            found = torch.as_tensor(reach(segments.clone(), lam), dtype=torch.float32)
            if found.shape != wanted.shape:
                return f"One share for each of the {len(segments)} rows; got {found.tolist()}."
            wrong = (~torch.isclose(found, wanted)).nonzero().flatten().tolist()
            if wrong:
                row = segments[wrong[0]].tolist()
                return (
                    f"{row} at λ = {lam}: {float(found[wrong[0]]):.3f} is not it. How often does "
                    "the recursion multiply by λ on its way from the last macro action to the "
                    "first?"
                )
        return None

    return judge(fault, "λ is charged a macro action, not a token.")


# ---- lesson 3: macro-GAE by hand ----


def check_decay(macro_value: Callable[[list[float]], float]) -> Verdict:
    """macro_value(values): the position-decayed macro value of one macro action (App. D.1)."""

    def fault():
        for values in ([0.3], [0.0, 3.0], [0.2, 0.4, 0.6], [1.0, 1.0, 1.0, 1.0]):
            segments = torch.zeros(1, len(values), dtype=torch.int64)
            wanted = float(macro.pool(torch.tensor([values]), segments, "decay"))
            found = float(macro_value(values))
            if not math.isclose(found, wanted, abs_tol=1e-5):
                if len(set(values)) == 1:
                    return f"The weights must sum to one: {values} should give {values[0]}."
                return (
                    f"{values}: {found:.3f} is not it. Write down the unnormalised weights "
                    f"1 / ({len(values)} - i) for i = 0 to {len(values) - 1} first; which token "
                    "gets the largest?"
                )
        return None

    return judge(fault, "Later tokens weigh more, and the weights sum to one.")


def check_delta(delta: Callable[[float, float, float, int, float], float]) -> Verdict:
    """delta(reward, value, next_value, length, gamma): the TD error of a macro step."""

    def fault():
        for length, gamma in ((1, 0.9), (3, 1.0), (3, 0.9), (5, 0.5)):
            found = float(delta(1.0, 0.25, 0.5, length, gamma))
            lengths = torch.tensor([[length, 1]])
            rewards, values = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.25, 0.5]])
            wanted = float(macro.gae(rewards, values, lengths, gamma, 0.0)[0, 0])
            if not math.isclose(found, wanted, abs_tol=1e-5):
                return (
                    f"length = {length}, gamma = {gamma}: {found:.4f} is off. How many tokens lie "
                    "between the two values, and what does gamma charge for each of them?"
                )
        return None

    return judge(fault, "Time passes in tokens, not in macro steps.")


def check_spread(spread_back: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    """spread_back(y, segments): macro quantities [B, M] back to tokens [B, T], 0 on padding."""
    segments = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 1, 1, -1, -1]])
    y = torch.tensor([[10.0, 20.0, 30.0], [40.0, 50.0, 0.0]])

    def fault():
        found = spread_back(y.clone(), segments.clone())
        wanted = macro.spread(y, segments)
        if found.shape != wanted.shape:
            return f"The result must be [B, T] = {list(wanted.shape)}; it is {list(found.shape)}."
        wrong = (found != wanted).nonzero().tolist()
        if not wrong:
            return None
        row, token = wrong[0]
        what = "padding" if segments[row, token] < 0 else "a valid token"
        return (
            f"Row {row}, token {token} is {what} and got {found[row, token]:g}. What does "
            f"segments hold there ({int(segments[row, token])}), and what should come out?"
        )

    return judge(fault, "Every token has its macro action's number, and padding has none.")


# ---- lesson 4: three bugs ----

RAGGED = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()


def check_rewards(rewards: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Verdict:
    """rewards(scores, kl, mask, kl_coef) -> [B, T]: the KL penalty at every token and the score at
    the last one of each response."""
    scores, kl = torch.tensor([1.0, 2.0, -3.0]), torch.arange(15).view(3, 5) / 10 - 0.4

    def fault():
        wanted = token_rewards(scores, kl, RAGGED, 0.1)
        found = rewards(scores.clone(), kl.clone(), RAGGED.clone(), 0.1)
        if found.shape != wanted.shape:
            return f"[B, T] = {list(wanted.shape)}, please; it is {list(found.shape)}."
        wrong = (~torch.isclose(found, wanted)).nonzero().tolist()
        if not wrong:
            return None
        row = wrong[0][0]
        return (
            f"Row {row} has {int(RAGGED[row].sum())} tokens and a score of {scores[row]:g}. Your "
            f"rewards of its tokens add up to {found[row][RAGGED[row]].sum():.2f}, with padding to "
            f"{found[row].sum():.2f}; score minus 0.1 times KL is {wanted[row].sum():.2f}."
        )

    return judge(fault, "The score is where the response ends, whatever the batch looks like.")


def check_policy_loss(loss: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]) -> Verdict:
    """loss(logprobs, old_logprobs, advantages, mask, clip): PPO's clipped loss, a mean over the
    valid tokens of the batch."""
    generator = torch.Generator().manual_seed(0)
    old, move, advantages = torch.randn(3, 3, 5, generator=generator)
    new = old + 0.3 * move

    def found(extra, junk=0.0):  # with more columns of padding, and what happens to stand there
        rows = (torch.where(RAGGED, x, junk) for x in (new, old, advantages))
        return float(
            loss(*(pad(x, (0, extra), value=junk) for x in rows), pad(RAGGED, (0, extra)), 0.2)
        )

    def same(a, b):
        return math.isclose(a, float(b), abs_tol=1e-5)

    def fault():
        wanted, full = float(policy_loss(new, old, advantages, RAGGED, 0.2)), RAGGED | True
        plain = loss(new, old, advantages, full, 0.2)
        if not same(float(plain), policy_loss(new, old, advantages, full, 0.2)):
            return "Without any padding it is not PPO's loss any more. Change the mean alone."
        if not same(found(0), found(2)):
            return (
                f"The same responses with two more columns of padding: the loss goes from "
                f"{found(0):.3f} to {found(2):.3f}. What is it divided by?"
            )
        if not same(found(0), wanted):
            return (
                f"{found(0):.3f} instead of {wanted:.3f}. Padding does no harm any more, but do "
                "the tokens of a short response weigh as much as those of a long one?"
            )
        if not same(found(2, junk=1.0), wanted):
            return (
                f"Numbers that are not 0 stand in the padding now, and the loss goes from "
                f"{wanted:.3f} to {found(2, junk=1.0):.3f}. The mask alone says what counts."
            )
        return None

    return judge(fault, "A mean over tokens, and over nothing else.")


def check_values(values: Callable[[Tensor, Tensor, int], Tensor]) -> Verdict:
    """values(outputs, starts, length) -> [B, length]: V(s_t) of the response tokens, from the
    critic's outputs [B, S] at the positions of prompt and response. The check asks a causal critic
    twice, with one token of the response changed in between."""
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
    starts, length = torch.tensor([3, 2]), 5

    def critic(ids):  # the output at a position depends on it and what is before it
        return (ids.float() * torch.linspace(1, 2, ids.shape[1])).cumsum(1)

    def fault():
        found = values(critic(ids), starts, length)
        if found.shape != (2, length):
            return f"[B, length] = [2, {length}], please; it is {list(found.shape)}."
        for row in range(2):
            for t in range(length):
                other = ids.clone()
                other[row, starts[row] + t] += 1
                again = values(critic(other), starts, length)
                if found[row, t] != again[row, t]:
                    return (
                        f"Row {row}: token {t} of the response was changed, and nothing before it. "
                        f"The value of the state in which it is chosen went from "
                        f"{found[row, t]:.1f} to {again[row, t]:.1f}: the baseline has seen the "
                        "action."
                    )
                if t + 1 < length and found[row, t + 1] == again[row, t + 1]:
                    return (
                        f"Row {row}: token {t} of the response was changed, but the value after it "
                        f"is the same, {found[row, t + 1]:.1f}. That one should have seen it."
                    )
        return None

    return judge(fault, "V(s_t) knows the tokens before t, all of them, and no more.")
