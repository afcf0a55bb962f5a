"""Termination conditions: which macro action each response token belongs to (Sec. 3.2.1, App. B.4).

A segmenter maps a batch of responses to `segments` [B, T] int64: along each row's valid tokens the
ids start at 0 and each step adds 0 or 1; off the mask they are -1. A mask may have padding anywhere
(leading, trailing, holes): a macro action runs along the valid tokens of its row and never sees the
rest. Every segmenter is called alike,

    segments = segmenter(tokens, mask, *, ref_logprobs=None, generator=None)

tokens and mask [B, T]; ref_logprobs [B, T], the reference model's log-probabilities of the tokens
at temperature 1 (only `Perplexity` reads them); generator, a source of randomness (only
`RandomNgram` draws). The result lies on the mask's device and nothing here waits for that device,
`check_segments` excepted.

`Constituency`, a parser's macro actions, stands in `marlhf.parsing`; its name is found here too.

A new termination condition is one frozen dataclass whose fields are its settings and whose
`__call__` says where macro actions start (`from_starts` numbers them), plus a line in
`TERMINATIONS`.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Protocol

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]


class Segmenter(Protocol):
    """What every termination condition looks like to its caller."""

    def __call__(
        self,
        tokens: Tensor,
        mask: Tensor,
        *,
        ref_logprobs: Tensor | None = None,
        generator: Generators | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Token:
    """Every token is a macro action of its own: token PPO (Sec. 3.2.3, n = 1)."""

    def __call__(self, tokens, mask, *, ref_logprobs=None, generator=None):
        mask = _checked_mask(tokens, mask)
        return _off_mask(valid_index(mask), mask)


@dataclass(frozen=True)
class FixedNgram:
    """A macro action ends after n tokens; the last of a row may be shorter (Sec. 3.2.1)."""

    n: int = 5

    def __post_init__(self):
        object.__setattr__(self, "n", _positive("n", self.n))

    def __call__(self, tokens, mask, *, ref_logprobs=None, generator=None):
        mask = _checked_mask(tokens, mask)
        return _off_mask(valid_index(mask).div_(self.n, rounding_mode="trunc"), mask)


@dataclass(frozen=True)
class RandomNgram:
    """Lengths in random order: `lengths` repeated `repeats` times, shuffled anew for every row; the
    tokens beyond their sum are one macro action (App. B.4; the official code has
    lengths = 1, 2, 3, 5, 10 and shuffles once for the whole batch).

    generator: one torch.Generator, drawn from for the whole batch at once, so that a row's segments
    depend on where in the batch the row stands; or a sequence of B generators, one a row, so that
    they depend on that row's generator alone. It may live on another device than the tokens (a CPU
    generator gives the same segments on every device). None: torch's default generator.
    Raises ValueError if the sequence does not have one generator a row.
    """

    lengths: tuple[int, ...] = (2, 3, 5, 10)
    repeats: int = 3

    def __post_init__(self):
        lengths = tuple(_positive("lengths", length) for length in self.lengths)
        if not lengths:
            raise ValueError("lengths: give at least one macro-action length")
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "repeats", _positive("repeats", self.repeats))

    def __call__(self, tokens, mask, *, ref_logprobs=None, generator=None):
        mask = _checked_mask(tokens, mask)
        pack = torch.tensor(self.lengths * self.repeats).to(mask.device, non_blocking=True)  # [L]
        keys = _uniforms(mask.shape[0], len(pack), generator, mask.device)  # [B, L]
        ends = pack[keys.argsort(dim=1, stable=True)].cumsum(1)  # [B, L], tokens before each end
        index = valid_index(mask)
        return _off_mask(torch.searchsorted(ends, index, right=True), mask)


@dataclass(frozen=True)
class Perplexity:
    """A macro action grows while the reference's perplexity does not rise and ends where the next
    token would raise it (App. B.4). With l_t = -log p_ref(a_t), the token a_t starts a new macro
    action when

        "cumulative"   l_t > mean of l over the macro action so far, which is
                       exp(mean l with a_t) > exp(mean l without): begun anew at each macro action
        "neighbour"    l_t > l of the token before it (the official code's quantity)

    A tie does not end a macro action. Perplexities 5, 4, 3, 6, 2 split as [5 4 3] [6 2] under both;
    the official code cuts one token early, [5 4] [3 6] [2], which is not reproduced here.

    ref_logprobs [B, T] (float32 or bfloat16, temperature 1) is required: ValueError without it.
    `cumulative` runs one loop over T, `neighbour` none.
    """

    reading: str = "cumulative"

    def __post_init__(self):
        if self.reading not in ("cumulative", "neighbour"):
            raise ValueError(_unknown("reading", self.reading, ("cumulative", "neighbour")))

    def __call__(self, tokens, mask, *, ref_logprobs=None, generator=None):
        mask = _checked_mask(tokens, mask)
        if ref_logprobs is None or ref_logprobs.shape != mask.shape:
            got = "none" if ref_logprobs is None else list(ref_logprobs.shape)
            raise ValueError(
                "Perplexity needs ref_logprobs, the reference's log-probability of each token at "
                f"temperature 1, of shape {list(mask.shape)}; it got {got}"
            )
        # Move each row's valid tokens to its front, so that neighbours are neighbours. What is off
        # the mask goes to the last column, which a row with padding leaves free.
        target = torch.where(mask, valid_index(mask), mask.shape[1] - 1)
        loss = torch.zeros_like(ref_logprobs, dtype=torch.float32)
        loss.scatter_(1, target, -ref_logprobs.detach().float())
        starts = self._rises(loss.t().contiguous()).t()
        return from_starts(starts.gather(1, target), mask)

    def _rises(self, loss):
        """loss [T, B] -> bool [T, B]: does the perplexity rise at this token?"""
        rises = torch.zeros_like(loss, dtype=torch.bool)
        if self.reading == "neighbour":
            rises[1:] = loss[1:] > loss[:-1]
            return rises
        mean, length = loss.new_zeros(2, loss.shape[1])
        for now, rise in zip(loss.unbind(0), rises.unbind(0), strict=True):
            torch.gt(now, mean, out=rise)
            length.masked_fill_(rise, 0.0).add_(1.0)
            # A running mean that a tie leaves exactly where it was; at weight 1 it is `now`.
            mean = torch.lerp(mean, now, length.reciprocal())
        return rises


@dataclass(frozen=True)
class Whole:
    """The whole response is one macro action: a contextual bandit (Sec. 3.2.3, n = infinity)."""

    def __call__(self, tokens, mask, *, ref_logprobs=None, generator=None):
        mask = _checked_mask(tokens, mask)
        return mask.long().sub_(1)


TERMINATIONS: dict[str, type] = {
    "token": Token,
    "fixed": FixedNgram,
    "random": RandomNgram,
    "perplexity": Perplexity,
    "whole": Whole,
}


def make_segmenter(termination: str, **settings) -> Segmenter:
    """The segmenter called `termination`, from the settings among n, lengths, repeats and reading
    that it has; the settings of other segmenters are passed over, so that one config serves all.

    Raises ValueError for a name or a setting that no segmenter has, with the nearest one.
    """
    if termination not in TERMINATIONS:
        raise ValueError(_unknown("termination", termination, TERMINATIONS))
    known = {field.name for kind in TERMINATIONS.values() for field in fields(kind)}
    for name in settings:
        if name not in known:
            raise ValueError(_unknown("segmenter setting", name, sorted(known)))
    kind = TERMINATIONS[termination]
    own = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in settings.items() if name in own})


def check_segments(segments: Tensor, mask: Tensor) -> None:
    """Raise ValueError, naming the first bad row and token, unless `segments` [B, T] is int64, is
    -1 exactly where `mask` [B, T] is false, and along each row's valid tokens starts at 0 and adds
    0 or 1 a step.

    It reads the result on the host, so it waits for the device: call it once a rollout, on CPU.
    """
    if segments.dtype != torch.int64 or segments.shape != mask.shape:
        raise ValueError(
            f"segments must be int64 {list(mask.shape)} like the mask; "
            f"got {segments.dtype} {list(segments.shape)}"
        )
    mask = mask.bool()
    # The id of the valid token before this one; -1 where there is none (ids may only grow, so the
    # running maximum is that id in every row that is right up to here).
    ids = torch.where(mask, segments, -1)
    before = torch.nn.functional.pad(ids, (1, 0), value=-1)[:, :-1]
    before = before.cummax(1).values if before.numel() else before
    step = ids - before
    first = valid_index(mask) == 0
    wrong_step = mask & torch.where(first, ids != 0, (step != 0) & (step != 1))
    wrong_padding = mask != (segments >= 0)
    wrong_padding |= ~mask & (segments != -1)
    wrong = wrong_step | wrong_padding
    if not wrong.any():
        return
    row, token = (int(i) for i in wrong.nonzero()[0])
    got = int(segments[row, token])
    if wrong_padding[row, token]:
        rule = "a valid token needs an id of 0 or more" if mask[row, token] else "padding needs -1"
    elif first[row, token]:
        rule = "a row's first valid token needs 0"
    else:
        last = int(before[row, token])
        rule = f"after {last} only {last} or {last + 1} may follow"
    raise ValueError(f"segments, row {row}, token {token}: found {got}, but {rule}")


def valid_index(mask: Tensor) -> Tensor:
    """mask [B, T] -> int64 [B, T]: the index of each valid token among its row's valid tokens.
    Off the mask: the index of the valid token before it, -1 if there is none."""
    return mask.cumsum(1).sub_(1)


def from_starts(starts: Tensor, mask: Tensor) -> Tensor:
    """Number the macro actions: `starts` bool [B, T] is true where one starts. A row's first valid
    token always starts one, and what `starts` says off the mask is not read."""
    starts = (starts | (valid_index(mask) == 0)) & mask
    return _off_mask(starts.cumsum(1).sub_(1), mask)


def __getattr__(name: str):
    """`Constituency` lives in marlhf.parsing, which needs this module and a tokenizer."""
    if name != "Constituency":
        raise AttributeError(f"module 'marlhf.segment' has no attribute {name!r}")
    from marlhf.parsing import Constituency

    return Constituency


def _off_mask(ids, mask):
    """ids, overwritten with -1 where the mask is false."""
    return ids.masked_fill_(~mask, -1)


def _checked_mask(tokens, mask):
    if mask.ndim != 2 or tokens.shape != mask.shape:
        raise ValueError(
            f"tokens and mask must both be [B, T]; got {list(tokens.shape)} and {list(mask.shape)}"
        )
    return mask.bool()


def _uniforms(rows, columns, generator, device):
    """[rows, columns] uniforms on `device`, from one generator or from one a row."""
    if generator is None:
        return torch.rand(rows, columns, device=device)
    if isinstance(generator, torch.Generator):
        keys = torch.rand(rows, columns, generator=generator, device=generator.device)
        return keys.to(device, non_blocking=True)
    if len(generator) != rows:
        raise ValueError(f"generator: {len(generator)} generators for {rows} rows; give one a row")
    keys = [torch.rand(1, columns, generator=each, device=each.device) for each in generator]
    return torch.cat([*keys, torch.empty(0, columns)]).to(device, non_blocking=True)


def _positive(name, value):
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: must be a whole number of tokens, got {value!r}") from None
    if number < 1:
        raise ValueError(f"{name}: must be at least 1, got {number}")
    return number


def _unknown(what, name, known):
    nearest = get_close_matches(str(name), known, n=1, cutoff=0.0)
    return f"{what}: there is no {name!r}; the nearest is {nearest[0]!r} of {', '.join(known)}"
