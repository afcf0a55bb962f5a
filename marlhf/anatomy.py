"""Pictures of lesson 4: one response with its rewards, values and advantages, the clipped objective
with the tokens on it, and the curves of a loop."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from marlhf.drawings import FONT, Drawing, label, legend, line, panels
from marlhf.figures import STYLES
from marlhf.rollout import Advantages, Rollout

GREY, BLUE, ORANGE = "#777777", "#0072B2", "#D55E00"


def pieces(rollout: Rollout, row: int, tokenizer) -> list[str]:
    """The text of each token of a response; a dot for what cannot be printed."""
    ids = rollout.tokens[row][rollout.mask[row]].tolist()
    texts = [tokenizer.decode([i]) for i in ids]
    return ["".join(c if c.isprintable() and c != "\ufffd" else "·" for c in t) for t in texts]


def response(rollout: Rollout, advantages: Advantages, row: int, tokenizer) -> Drawing:
    """One response, token by token: reward, value, advantage; lines where macro actions end."""
    keep = rollout.mask[row]
    rewards, values, found = (
        x[row][keep].numpy() for x in (advantages.rewards, rollout.values, advantages.advantages)
    )
    t, segments = np.arange(len(rewards)), advantages.segments[row][keep]
    figure, axes = panels(3, 1, 1.9, sharex=True)
    axes[0, 0].bar(t, rewards, color=GREY)
    axes[0, 0].bar(t[-1:], rewards[-1:], color=ORANGE)
    axes[1, 0].step(t, values, where="mid", color=BLUE, linewidth=2)
    axes[2, 0].step(t, found, where="mid", color=ORANGE, linewidth=2)
    for axis, name in zip(axes[:, 0], ("reward", "value", "advantage"), strict=True):
        axis.grid(visible=False, axis="x")
        axis.axhline(0, color="#555555", linewidth=0.8)
        for end in (segments[1:] != segments[:-1]).nonzero().flatten().tolist():
            axis.axvline(end + 0.5, color="#555555", linestyle=(0, (2, 2)), linewidth=1)
        label(axis, y=name)
    names = [text.strip() or "␣" for text in pieces(rollout, row, tokenizer)]
    axes[2, 0].set_xticks(t, names, rotation=90)
    axes[2, 0].tick_params(axis="x", labelsize=FONT - 3)
    steps = found[np.unique(segments, return_index=True)[1]]
    return Drawing(
        figure,
        f"A response of {len(t)} tokens in {len(steps)} macro actions. Rewards: "
        f"{_signed(rewards[:-1].sum())} of KL penalties, then {_signed(rewards[-1])} at the last "
        f"token. Values from {_signed(values.min())} to {_signed(values.max())}. Advantages of the "
        f"macro actions: {' '.join(map(_signed, steps))}.",
    )


def clipping(ratios: Tensor, advantages: Tensor, clip: float = 0.2, step: float = 1.0) -> Drawing:
    """The clipped objective over the ratio and the tokens [N] on it, a panel a sign of A.

    step scales every log-ratio: 0 is the policy that was sampled from, 1 the one after the update.
    """
    moved = ratios.log().mul(step).exp()
    figure, axes = panels(1, 2, 3.6, sharey=True)
    x, words = torch.linspace(0.3, 2.0, 200), []
    for axis, sign in zip(axes[0], (1.0, -1.0), strict=True):
        r = moved[advantages * sign > 0]
        flat = r > 1 + clip if sign > 0 else r < 1 - clip
        axis.plot(x, _surrogate(x, sign, clip), color="#333333", linewidth=2, zorder=1)
        axis.axvspan(1 - clip, 1 + clip, color="#EEEEEE", zorder=0)
        for which, colour, marker, name in (
            (~flat, BLUE, "o", "has a gradient"),
            (flat, ORANGE, "x", "clipped: gradient 0"),
        ):
            points = r[which].clamp(0.3, 2.0)
            options = {"color": colour, "marker": marker, "s": 40, "alpha": 0.6, "label": name}
            axis.scatter(points, _surrogate(points, sign, clip), **options)
        label(axis, "ratio", title="A > 0" if sign > 0 else "A < 0")
        share = round(10 * float(flat.float().mean()))
        words.append(f"{share} in ten where A {'>' if sign > 0 else '<'} 0")
    label(axes[0, 0], y="objective / |A|")
    legend(figure, axes[0, 0])
    return Drawing(
        figure,
        f"Clipped objective at ε = {clip:g} with the tokens on it. Tokens without a gradient: "
        f"{'; '.join(words)}.",
    )


def _surrogate(r: Tensor, sign: float, clip: float) -> Tensor:
    return torch.minimum(r * sign, r.clamp(1 - clip, 1 + clip) * sign)


def curves(runs: Mapping[str, Mapping[str, Sequence[float]]]) -> Drawing:
    """Score and KL over updates, {name: {"score": [...], "kl": [...]}}, a line a run."""
    figure, axes = panels(1, 2, 3.2)
    styles = [STYLES["macro5"], STYLES["whole"], STYLES["token_matched"]]
    words = []
    for style, (name, run) in zip(styles, runs.items(), strict=False):
        for axis, what in zip(axes[0], ("score", "kl"), strict=True):
            line(axis, range(len(run[what])), run[what], style, name, markevery=2)
        words.append(f"{name}: score {run['score'][-1]:.1f} and KL {run['kl'][-1]:.0f} at the end")
    for axis, title in zip(axes[0], ("score", "KL to the reference (nats)"), strict=True):
        axis.set_xticks(range(0, len(run["score"]), 5))
        label(axis, "updates", title=title)
    legend(figure, axes[0, 0])
    return Drawing(figure, f"A loop of {len(run['score'])} updates. {'; '.join(words)}.")


def _signed(x) -> str:
    return f"{round(float(x), 2) + 0.0:+.2f}"
