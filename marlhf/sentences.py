"""Lesson 2: sentences of the summarization twin with numbers for every token, and how termination
conditions split them, as HTML and as pictures.

The HTML has no JavaScript and no style sheet, so that it looks the same in JupyterLab, trusted or
not, and on a static page: macro actions are tinted in turn, a bar stands where one ends (for those
who do not see colours), and numbers are in title attributes (hover) and in a table.
"""

import html
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from marlhf import macro
from marlhf.drawings import FONT, TINTS, Drawing, label, legend, panels
from marlhf.objectives import kl_k1, token_rewards
from marlhf.segment import Segmenter
from marlhf.tasks import tldr_twin
from marlhf.text import Example, decode, encode_response

BAR = "│"  # where a macro action ends
AHEAD = 0.4  # points the made-up critic expects of a slot that is not mentioned yet
STYLES = {  # one condition each, as the lesson names them
    "token": ("#000000", "-", "o"),
    "fixed": ("#D55E00", "-", "s"),
    "random": ("#E69F00", (0, (5, 2)), "P"),
    "cumulative": ("#009E73", (0, (5, 2)), "^"),
    "neighbour": ("#56B4E9", (0, (3, 1, 1, 1)), "X"),
    "whole": ("#0072B2", (0, (6, 1.5, 1.5, 1.5)), "D"),
}


# ---- a sentence and its numbers ----


class CountingModel:
    """A language model of counts: the share of each token after the `order` tokens before it,
    smoothed with the share after one token less, down to the same share for every token:

        p_k(a | c) = (count(c, a) + p_{k-1}(a | c without its first token)) / (count(c) + 1)

    It reads responses alone, never prompts."""

    def __init__(self, rows: Sequence[Sequence[int]], vocabulary: int, order: int = 3):
        self.vocabulary, self.order = vocabulary, order
        self.seen: Counter[tuple] = Counter()  # contexts with the token after them
        self.contexts: Counter[tuple] = Counter()
        for row in rows:
            for context, token in self._places(row):
                self.seen[(*context, token)] += 1
                self.contexts[context] += 1

    def _places(self, row):
        """Every token of a row with its contexts of 0 to `order` tokens; -1 is before the row."""
        padded = [-1] * self.order + list(row)
        for t, token in enumerate(row):
            before = tuple(padded[t : t + self.order])
            for length in range(self.order + 1):
                yield before[self.order - length :], token

    def logprobs(self, row: Sequence[int]) -> Tensor:
        """log p of each token of a row, [T] float64, in nats."""
        found, p = [], 0.0
        for context, token in self._places(row):
            p = p if context else 1 / self.vocabulary
            p = (self.seen[(*context, token)] + p) / (self.contexts[context] + 1)
            if len(context) == self.order:
                found.append(math.log(p))
        return torch.tensor(found, dtype=torch.float64)


@dataclass(frozen=True)
class Sentence:
    """A response with what PPO knows of it; tensors are [1, T], a batch of one."""

    pieces: tuple[str, ...]  # the text of each token
    tokens: Tensor  # int64
    logprobs: Tensor  # of the policy
    ref_logprobs: Tensor  # of the reference, temperature 1
    values: Tensor
    score: float

    @property
    def mask(self) -> Tensor:
        return torch.ones_like(self.tokens, dtype=torch.bool)

    def cut(self, segmenter: Segmenter, seed: int = 0) -> Tensor:
        """segments [1, T]; seed is read by random lengths alone."""
        generator = torch.Generator().manual_seed(seed)
        return segmenter(
            self.tokens, self.mask, ref_logprobs=self.ref_logprobs, generator=generator
        )

    def rewards(self, kl_coef: float) -> Tensor:
        """The KL penalty at every token, the score at the last one. [1, T]"""
        kl = kl_k1(self.logprobs, self.ref_logprobs)
        return token_rewards(torch.tensor([self.score]), kl, self.mask, kl_coef)


def make_sentence(
    example: Example, tokenizer, policy: CountingModel, reference: CountingModel
) -> Sentence:
    """An example's demonstration as if a policy had written it. Made up: the values, by
    `made_up_values`. The score is the twin's true score."""
    ids = encode_response(example.response, tokenizer, 10**6)
    facts = tldr_twin.read_post(example.prompt.body)
    return Sentence(
        pieces=tuple(decode([i], tokenizer) or "⟨end⟩" for i in ids),
        tokens=torch.tensor([ids]),
        logprobs=policy.logprobs(ids)[None],
        ref_logprobs=reference.logprobs(ids)[None],
        values=made_up_values([decode(ids[:t], tokenizer) for t in range(len(ids))], facts),
        score=tldr_twin.judge(facts, example.response).score,
    )


def made_up_values(prefixes: Sequence[str], facts: tldr_twin.Facts) -> Tensor:
    """V(s_t) [1, T] of a critic that nobody trained: points for what stands there so far, with
    weights of its own (not the hidden scorer's), and AHEAD for every slot not mentioned yet."""
    known = {value for values in tldr_twin.VALUES.values() for value in values}
    values = []
    for text in prefixes:
        rest, _, word = text.rpartition(" ")
        if word not in known and any(value.startswith(word) for value in known):
            text = rest  # a value that is only half written is not judged yet
        said = tldr_twin.judge(facts, text)
        points = said.right - said.wrong - said.repeated - (said.distractors + said.fillers) / 2
        values.append(points + AHEAD * (len(tldr_twin.SLOTS) - said.right - said.wrong))
    return torch.tensor([values], dtype=torch.float64)


# ---- HTML ----


class Markup:
    """HTML, and the plain text that nbval compares and a terminal shows."""

    def __init__(self, html: str, text: str):
        self.html, self.text = html, text

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"text/html": self.html, "text/plain": self.text}

    def __repr__(self) -> str:
        return self.text


def runs(segments: Tensor) -> list[list[int]]:
    """segments [1, T] -> the positions of the tokens of each macro action."""
    found: list[list[int]] = []
    for t, m in enumerate(segments[0].tolist()):
        if m >= 0:
            found += [[]] if m == len(found) else []
            found[m].append(t)
    return found


def plain(sentence: Sentence, segments: Tensor) -> str:
    """The sentence with a bar at the end of every macro action."""
    parts = ("".join(sentence.pieces[t] for t in group) for group in runs(segments))
    return BAR.join(parts) + BAR


def splits(sentence: Sentence, cuts: Mapping[str, Tensor]) -> Markup:
    """One sentence under several conditions, {name: segments [1, T]}, a block each."""
    blocks, lines = [], []
    for name, segments in cuts.items():
        groups = runs(segments)
        count = f"{len(groups)} macro action{'s' * (len(groups) > 1)}"
        parts = []
        for m, group in enumerate(groups):
            where = f"token {group[0]}"
            if len(group) > 1:
                where = f"tokens {group[0]} to {group[-1]}, {len(group)} of them"
            inside = "".join(html.escape(sentence.pieces[t]) for t in group)
            parts.append(_tinted(m, inside, f"macro action {m}: {where}"))
        blocks.append(_block(f"<b>{html.escape(name)}</b>: {count}", parts))
        lines.append(f"{name}: {count}\n{plain(sentence, segments)}")
    return Markup("".join(blocks), "\n".join(lines))


def credited(
    sentence: Sentence,
    segments: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl_coef: float = 0.05,
    value_weights: str = "equal",
) -> Markup:
    """One sentence with its advantages: small under each macro action, with everything else on
    hover over a token, and as a table of macro actions under the sentence (folded)."""
    r, v, _ = rewards_and_values = (sentence.rewards(kl_coef), sentence.values, segments)
    advantages, returns = macro.macro_gae(*rewards_and_values, gamma, lam, value_weights)
    pooled, value = macro.pool(r, segments, "sum"), macro.pool(v, segments, value_weights)
    parts, rows, lines = [], [], []
    for m, group in enumerate(runs(segments)):
        a, g = (float(x[0, group[0]]) for x in (advantages, returns))
        numbers = [_signed(pooled[0, m]), _signed(value[0, m]), _signed(a), _signed(g)]
        whole = "macro action {}: reward {}, value {}, advantage {}, return {}".format(m, *numbers)
        inside = "".join(
            f'<span title="token {t}: log π {_signed(sentence.logprobs[0, t])}, '
            f"log π_ref {_signed(sentence.ref_logprobs[0, t])}, reward {_signed(r[0, t])}, "
            f'value {_signed(v[0, t])}&#10;{whole}">{html.escape(sentence.pieces[t])}</span>'
            for t in group
        )
        parts.append(_tinted(m, f"{inside}<sub>{_signed(a)}</sub>", whole))
        text = "".join(sentence.pieces[t] for t in group)
        rows.append([str(m), html.escape(text.strip() or "(space)"), str(len(group)), *numbers])
        lines.append(f"{text}{BAR} {_signed(a)}")
    head = ["macro action", "text", "tokens", "reward", "value", "advantage", "return"]
    table = "".join(
        "<tr>" + "".join(f"<{kind}>{cell}</{kind}>" for cell in row) + "</tr>"
        for kind, row in [("th", head), *(("td", row) for row in rows)]
    )
    title = f"score {_signed(sentence.score)}, {len(rows)} macro actions; small: the advantage"
    folded = f"<details><summary>numbers as a table</summary><table>{table}</table></details>"
    return Markup(_block(title, parts) + folded, f"{title}\n" + "\n".join(lines))


def _tinted(m: int, inside: str, title: str) -> str:
    style = f"background-color:{TINTS[m % len(TINTS)]};color:#111111"
    return f'<span style="{style}" title="{title}">{inside}</span><b>{BAR}</b>'


def _block(title: str, parts: Sequence[str]) -> str:
    return (
        f'<div style="margin-bottom:10px">{title}'
        f'<div style="font-size:15px;line-height:1.9">{"".join(parts)}</div></div>'
    )


def _signed(x) -> str:
    """'+0.25': two decimals, no minus before a zero, and one at which no line is broken."""
    return f"{round(float(x), 2) + 0.0:+.2f}".replace("-", "−")


# ---- pictures ----


def surprise(sentence: Sentence, cuts: Mapping[str, Tensor]) -> Drawing:
    """The reference's loss at every token, and under it where each condition begins anew."""
    loss, t = -sentence.ref_logprobs[0].numpy(), np.arange(sentence.tokens.shape[1])
    figure, axes = panels(1, 1, 4.0)
    axis, words = axes[0, 0], []
    axis.bar(t, loss, color="#999999", label="−log p of the reference")
    for k, (name, segments) in enumerate(cuts.items()):
        starts = [group[0] for group in runs(segments)]
        colour, _, marker = STYLES[name]
        options = {"color": colour, "marker": marker, "s": 45, "label": f"{name}: begins"}
        axis.scatter(starts, [-0.5 - 0.6 * k] * len(starts), **options)
        words.append(f"{name} begins at {', '.join(map(str, starts))}")
    axis.set_xticks(t, [piece.strip() or "␣" for piece in sentence.pieces], rotation=90)
    axis.tick_params(axis="x", labelsize=FONT - 5)
    axis.set_xlim(-0.8, len(t) - 0.2)
    axis.set_yticks(range(int(loss.max()) + 1))
    label(axis, y="nats")
    legend(figure, axis)
    return Drawing(figure, f"Losses of {len(t)} tokens; {'; '.join(words)}.")


def credit(sentence: Sentence, cuts: Mapping[str, Tensor], lam: float, kl_coef: float) -> Drawing:
    """Values along the sentence, and each condition's advantages under them."""
    figure, axes = panels(2, 1, 2.6, sharex=True)
    t = np.arange(sentence.tokens.shape[1])
    axes[0, 0].step(t, sentence.values[0], where="mid", color="#555555", linewidth=2)
    label(axes[0, 0], y="value\n(made up)")
    rewards, words = sentence.rewards(kl_coef), []
    for name, segments in cuts.items():
        found, _ = macro.macro_gae(rewards, sentence.values, segments, 1.0, lam)
        colour, dash, _ = STYLES[name]
        options = {"color": colour, "linestyle": dash, "linewidth": 2, "label": name}
        axes[1, 0].step(t, found[0], where="mid", **options)
        first, last = (round(float(found[0, k]), 2) + 0.0 for k in (0, -1))
        words.append(f"{name} from {first:.2f} to {last:.2f}")
    axes[1, 0].axhline(0, color="#555555", linewidth=0.8)
    axes[1, 0].set_xticks(t, [piece.strip() or "␣" for piece in sentence.pieces], rotation=90)
    axes[1, 0].tick_params(axis="x", labelsize=FONT - 5)
    label(axes[1, 0], y="advantage")
    legend(figure, axes[1, 0])
    return Drawing(figure, f"Advantages of the first and the last token: {'; '.join(words)}.")
