"""Pictures of the lesson notebooks. Every function returns a `Drawing`: shown as PNG with its
alternative text, which is also the plain text that nbval compares. Fonts are sized to be read at
half a page's width; colours are Okabe and Ito's, and line styles and markers differ too. One
section a lesson.
"""

import base64
import math
from collections.abc import Mapping
from io import BytesIO

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from marlhf import chain as chains
from marlhf import macro
from marlhf.chain import Chain, Estimator
from marlhf.figures import STYLES, Picture

# ---- every lesson ----

FONT = 14  # points, on pictures eight inches wide
TINTS = ("#BBD9EE", "#F7D3B5", "#C3E6DA", "#F0D5E5", "#F5EBB0", "#DDDDDD")  # macro actions in turn


class Drawing(Picture):
    """A `Picture` that a notebook shows by itself."""

    def png(self) -> bytes:
        """120 dots an inch, 64 colours: a third of the size in a committed notebook."""
        drawn, data = BytesIO(), BytesIO()
        self.figure.savefig(drawn, format="png", dpi=120)
        image = Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE)
        image.save(data, format="png", optimize=True)
        return data.getvalue()

    def _repr_mimebundle_(self, include=None, exclude=None):
        image = base64.b64encode(self.png()).decode()
        return {"image/png": image, "text/plain": self.alt}, {"image/png": {"alt": self.alt}}

    def __repr__(self) -> str:
        return self.alt


def panels(rows: int, columns: int, height: float = 3.2, **options) -> tuple[Figure, np.ndarray]:
    """A figure eight inches wide and its axes [rows, columns]; options go to `subplots`."""
    figure = Figure(figsize=(8.0, height * rows + 0.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#DDDDDD", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=FONT - 2)
    return figure, axes


def legend(figure: Figure, axis, columns: int = 3) -> None:
    """One legend under all panels, from one of them."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        fontsize=FONT - 1,
        frameon=False,
        handlelength=2.6,
        columnspacing=1.2,
    )


def line(axis, x, y, style: tuple, label: str, **options) -> None:
    """A line with markers in a style of (colour, dashes, marker)."""
    colour, dash, marker = style
    axis.plot(
        x, y, color=colour, linestyle=dash, marker=marker, label=label, linewidth=2, markersize=6,
        **options,
    )  # fmt: skip


def _numbers(numbers) -> str:
    """'0.20 0.40': two decimals, and no minus before a zero."""
    return " ".join(f"{round(float(x), 2) + 0.0:.2f}" for x in numbers)


def label(axis, x=None, y=None, title=None):
    """Names of the axes and the panel, in the font of the lessons."""
    if x:
        axis.set_xlabel(x, fontsize=FONT)
    if y:
        axis.set_ylabel(y, fontsize=FONT)
    if title:
        axis.set_title(title, fontsize=FONT, loc="left")


# ---- lesson 1: credit on an exact chain ----

WEIGHT_STYLES = {  # value weights, and the baseline of the last exercise
    "equal": ("#D55E00", "-", "s"),
    "unit": ("#56B4E9", (0, (3, 1, 1, 1)), "X"),
    "decay": ("#E69F00", (0, (5, 2)), "P"),
    "first": ("#0072B2", (0, (6, 1.5, 1.5, 1.5)), "D"),
    "own": ("#CC79A7", (0, (1.5, 1.2)), "v"),
}
ARM_STYLES = {  # names of arms in lesson 1
    "token GAE": STYLES["token"],
    "token GAE (matched λ)": STYLES["token_matched"],
    "Monte Carlo": STYLES["whole"],
    "macro (equal)": STYLES["macro5"],
    "macro (first)": ("#CC79A7", (0, (1.5, 1.2)), "v"),
    "your setting": STYLES["macro5"],
} | WEIGHT_STYLES


def truth(chain: Chain, responses: chains.Responses) -> Drawing:
    """The true gradient, token by token, and the value along the first two responses."""
    figure, axes = panels(2, 1, 2.3, sharex=True)
    gradient, t = chains.policy_gradient(chain), np.arange(chain.tokens)
    axes[0, 0].bar(t, gradient, color="#555555")
    label(axes[0, 0], y="true\ngradient")
    ends = []
    for row, name in ((0, "token GAE"), (1, "macro (equal)")):
        states = responses.states[row]
        value = chains.values(chain)[torch.arange(chain.tokens + 1), states]
        colour, dash, _ = ARM_STYLES[name]
        axes[1, 0].step(
            range(chain.tokens + 1), value, where="post", color=colour, linestyle=dash, linewidth=2
        )
        ends.append(f"{float(value[-1]):.2f}")
    axes[1, 0].axhline(0, color="#555555", linewidth=0.8)
    label(axes[1, 0], "token", "value of\nthe state")
    return Drawing(
        figure,
        f"Above, the true policy gradient of each of {chain.tokens} tokens, from "
        f"{float(gradient.min()):.3f} to {float(gradient.max()):.3f}. Below, the exact value along "
        f"two responses, from {float(value[0]) + 0.0:.2f} to rewards of {' and '.join(ends)}.",
    )


def credit(
    chain: Chain, responses: chains.Responses, critic: Tensor, arms: Mapping[str, Estimator]
) -> Drawing:
    """The first response: true advantages as bars, estimates as lines, a panel an arm."""
    figure, axes = panels(len(arms), 1, 1.9, sharex=True, sharey=True)
    one = chains.Responses(responses.actions[:1], responses.states[:1], responses.share[:1])
    true = chains.true_advantages(chain, one)[0]
    words = []
    for axis, (name, estimator) in zip(axes[:, 0], arms.items(), strict=True):
        found = chains.estimated_advantages(chain, one, critic, estimator)[0]
        axis.bar(range(chain.tokens), true, color="#BBBBBB", label="true advantage")
        axis.step(range(chain.tokens), found, where="mid", color=ARM_STYLES[name][0], linewidth=2.2)
        axis.axhline(0, color="#555555", linewidth=0.8)
        label(axis, title=name)
        match = float(torch.corrcoef(torch.stack([true, found]))[0, 1].nan_to_num())
        words.append(f"{name} {match:.2f}")
    label(axes[-1, 0], "token")
    figure.supylabel("advantage (grey: true)", fontsize=FONT)
    return Drawing(
        figure,
        "Advantages of the tokens of one response, true and estimated. Correlation of estimate and "
        f"truth over its tokens: {', '.join(words)}.",
    )


def shares(shares: Mapping[str, Tensor], boundaries: int = 0) -> Drawing:
    """Share of its true gradient that each token gets on average, a line an estimator; upright
    lines where a macro action of `boundaries` tokens begins."""
    figure, axes = panels(1, 1, 3.9)
    axis = axes[0, 0]
    for name, share in shares.items():
        every = 1 if len(share) <= 20 else 3
        line(axis, range(len(share)), share, ARM_STYLES[name], name, markevery=every)
    for x in range(0, len(share), boundaries) if boundaries else ():
        axis.axvline(x - 0.5, color="#AAAAAA", linewidth=1)
    axis.set_ylim(-0.05, 1.08)
    label(axis, "token", "share of its credit (mean)")
    legend(figure, axis)
    ends = ", ".join(f"{name} {_numbers(share[:5])}" for name, share in shares.items())
    return Drawing(
        figure, f"Share of its true gradient that each token gets. The first five tokens: {ends}."
    )


def quality(table: pd.DataFrame) -> Drawing:
    """Cosine (bias) above signal-to-noise below, against n, a column a critic, a line each value
    weight; columns critic, weights, n, cosine, snr."""
    critics = list(dict.fromkeys(table["critic"]))
    ticks = sorted(table["n"].unique())
    figure, axes = panels(2, len(critics), 2.9, sharex=True, sharey="row")
    words = []
    for column, critic in enumerate(critics):
        for weights, rows in table[table["critic"] == critic].groupby("weights", sort=False):
            places = [ticks.index(n) for n in rows["n"]]
            for axis, measure in zip(axes[:, column], ("cosine", "snr"), strict=True):
                line(axis, places, rows[measure], WEIGHT_STYLES[weights], weights)
            five = rows[rows["n"] == 5].iloc[0]
            words.append(f"{critic} critic, {weights}: {five['cosine']:.2f}, {five['snr']:.3f}")
        if table[table["critic"] == critic].groupby("n")["cosine"].std().max() < 1e-6:
            axes[0, column].text(
                0.5,
                0.5,
                "all the\nsame",
                ha="center",
                va="center",
                fontsize=FONT,
                transform=axes[0, column].transAxes,
            )
        label(axes[0, column], title=f"{critic} critic")
        names = ["∞" if math.isinf(n) else f"{n:g}" for n in ticks]
        axes[1, column].set_xticks(range(len(ticks)), names)
        label(axes[1, column], "n")
        axes[1, column].set_yscale("log")
    label(axes[0, 0], y="cosine with\ntrue gradient")
    label(axes[1, 0], y="signal-to-noise\nof one response")
    legend(figure, axes[0, 0], 5)
    return Drawing(figure, f"Cosine and signal-to-noise over n. At n = 5: {'; '.join(words)}.")


def horizon(table: pd.DataFrame) -> Drawing:
    """Cosine with the true gradient against response length, a panel a lambda; columns lam, arm,
    tokens, cosine."""
    lams = list(dict.fromkeys(table["lam"]))
    figure, axes = panels(1, len(lams), 3.2, sharey=True)
    words = []
    for axis, lam in zip(axes[0], lams, strict=True):
        for arm, rows in table[table["lam"] == lam].groupby("arm", sort=False):
            line(axis, rows["tokens"], rows["cosine"], ARM_STYLES[arm], arm)
            words.append(f"{arm} at λ = {lam:g} {rows['cosine'].iloc[-1]:.2f}")
        axis.set_xscale("log", base=2)
        axis.set_xticks(rows["tokens"], [str(n) for n in rows["tokens"]])
        axis.minorticks_off()
        axis.set_ylim(0, 1.05)
        label(axis, "tokens in the response", title=f"λ = {lam:g}")
    label(axes[0, 0], y="cosine with true gradient")
    legend(figure, axes[0, 0], 2)
    longest = table["tokens"].max()
    return Drawing(
        figure,
        "Cosine with the true gradient against response length, constant critic. At "
        f"{longest} tokens: {', '.join(words)}.",
    )


def aim(found: Mapping[str, Mapping[str, chains.Quality]], columns: int = 3) -> Drawing:
    """How well a batch's gradient points, against its size: a panel a critic, a line an arm."""
    sizes = [2**k for k in range(2, 13)]
    columns = min(columns, len(found))
    rows = -(-len(found) // columns)
    figure, axes = panels(rows, columns, 2.9, sharex=True, sharey=True)
    words = []
    for axis, (critic, arms) in zip(axes.flat, found.items(), strict=False):
        said = []
        for name, each in arms.items():
            aims = [each.aim(size) for size in sizes]
            line(axis, sizes, aims, ARM_STYLES[name], name, markevery=2)
            said.append(f"{name} {each.aim(64):.2f}")
        words.append(f"critic {' '.join(critic.split())}: {', '.join(said)}")
        axis.set_xscale("log", base=4)
        axis.set_xticks([4, 64, 1024], ["4", "64", "1024"])
        axis.minorticks_off()
        axis.set_ylim(0, 1.05)
        label(axis, title=critic)
    for axis in axes[-1]:
        label(axis, "responses in a batch")
    figure.supylabel("cosine of batch gradient and truth", fontsize=FONT)
    legend(figure, axes.flat[0])
    return Drawing(figure, f"Cosine at 64 responses. {'; '.join(words)}.")


def explorer(
    chain: Chain,
    responses: chains.Responses,
    n: float,
    lam: float,
    weights: str,
    informed: float,
    noise: float,
) -> Drawing:
    """Shares of credit and batch cosine of one setting, beside token GAE and Monte Carlo."""
    critic = chains.make_critic(chain, informed, noise)
    arms = {
        "token GAE": Estimator(1, lam),
        "your setting": Estimator(n, lam, weights),
        "Monte Carlo": Estimator(math.inf, lam, "first"),
    }
    sizes = [2**k for k in range(2, 13)]
    figure, axes = panels(1, 2, 3.4)
    words = []
    for name, estimator in arms.items():
        share = chains.credit_shares(chain, critic, estimator)
        found = chains.quality(chain, [critic], estimator, responses)
        aims = [found.aim(size) for size in sizes]
        line(axes[0, 0], range(chain.tokens), share, ARM_STYLES[name], name, markevery=3)
        line(axes[0, 1], sizes, aims, ARM_STYLES[name], name, markevery=2)
        words.append(f"{name} {found.cosine:.2f}, {found.snr:.3f}, {found.aim(64):.2f}")
    axes[0, 0].set_ylim(-0.4, 1.6)
    axes[0, 1].set_xscale("log", base=4)
    axes[0, 1].set_xticks([4, 64, 1024], ["4", "64", "1024"])
    axes[0, 1].minorticks_off()
    axes[0, 1].set_ylim(-0.3, 1.05)
    label(axes[0, 0], "token", title="share of its credit (mean)")
    label(axes[0, 1], "responses in a batch", title="cosine with the truth")
    legend(figure, axes[0, 0])
    return Drawing(
        figure, f"Cosine, signal-to-noise and cosine at 64 responses: {'; '.join(words)}."
    )


# ---- lesson 3: macro-GAE by hand ----


def ladder(
    rewards: Tensor,
    values: Tensor,
    segments: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    value_weights: str = "equal",
    reward_weights: str = "sum",
) -> Drawing:
    """One response [T] from tokens to macro actions and back, every number in its box."""
    batch = [x[None] for x in (rewards, values, segments)]
    lengths = macro.macro_lengths(batch[2])
    pooled = macro.pool(batch[0], batch[2], reward_weights, gamma)
    value = macro.pool(batch[1], batch[2], value_weights)
    advantage = macro.gae(pooled, value, lengths, gamma, lam)
    delta = macro.gae(pooled, value, lengths, gamma, 0.0)
    tokens, returns = macro.macro_gae(*batch, gamma, lam, value_weights, reward_weights)
    length = lengths[0].tolist()
    each = [(t, 1, int(m)) for t, m in enumerate(segments)]
    steps = [(sum(length[:m]), k, m) for m, k in enumerate(length)]
    rungs = [
        ("reward r", rewards, each),
        ("value V(s)", values, each),
        ("macro reward R", pooled[0], steps),
        ("macro value V", value[0], steps),
        ("TD error δ", delta[0], steps),
        ("advantage A  ←", advantage[0], steps),
        ("A of each token", tokens[0], each),
        ("return A + V", returns[0], each),
    ]
    figure = Figure(figsize=(8.0, 5.8), layout="constrained")
    axis = figure.subplots()
    for y, word in ((2.3, "↓  pool into macro actions"), (6.9, "↓  spread back to tokens")):
        axis.text(len(segments) / 2, y, word, ha="center", va="center", fontsize=FONT - 1)
    for y, (name, numbers, boxes) in enumerate(rungs):
        y += 0.6 * (y > 1) + 0.6 * (y > 5)  # gaps: tokens, macro steps, tokens again
        axis.text(-0.15, y + 0.5, name, ha="right", va="center", fontsize=FONT)
        for (left, width, m), number in zip(boxes, numbers, strict=True):
            tint = TINTS[m % len(TINTS)]
            box = Rectangle((left, y), width, 0.94, facecolor=tint, edgecolor="#333333")
            axis.add_patch(box)
            text = _numbers([number])
            axis.text(left + width / 2, y + 0.5, text, ha="center", va="center", fontsize=FONT)
    axis.set(xlim=(-2.9, len(segments) + 0.1), ylim=(len(rungs) + 1.2, -0.1))
    axis.axis("off")
    said = "; ".join(f"{name.rstrip(' ←')} {_numbers(numbers)}" for name, numbers, _ in rungs)
    return Drawing(figure, f"From tokens to {len(length)} macro actions and back: {said}.")
