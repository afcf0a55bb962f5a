"""Pictures of lesson 4, on a rollout made by hand."""

import torch

from marlhf import anatomy
from marlhf.rollout import Advantages, Rollout


class Letters:
    """A tokenizer of one letter a token, the third of which cannot be printed."""

    def decode(self, ids):
        return "a<\x07"[ids[0]]


def make():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    tokens, zeros = torch.tensor([[0, 1, 2], [0, 0, 0]]), torch.zeros(2, 3)
    rollout = Rollout(
        update=0, examples=[], places=torch.arange(2), texts=[], ids=tokens,
        starts=torch.zeros(2).long(), tokens=tokens, mask=mask, finished=mask.all(1),
        logprobs=zeros, full_logprobs=zeros,
    )  # fmt: skip
    rollout.values = torch.tensor([[0.1, 0.2, 0.3], [0.4, 9.0, 9.0]])
    segments = torch.tensor([[0, 0, 1], [0, -1, -1]])
    rewards = torch.tensor([[-0.25, 0.0, 1.0], [2.0, 0.0, 0.0]])
    found = torch.tensor([[0.5, 0.5, -0.75], [1.0, 0.0, 0.0]])
    return rollout, Advantages(segments, rewards, found, found)


def test_a_response_without_its_padding():
    rollout, advantages = make()
    assert anatomy.pieces(rollout, 0, Letters()) == ["a", "<", "·"]
    assert anatomy.pieces(rollout, 1, Letters()) == ["a"]
    long = anatomy.response(rollout, advantages, 0, Letters())
    assert "3 tokens in 2 macro actions" in long.alt
    assert "-0.25 of KL penalties, then +1.00" in long.alt
    assert long.alt.endswith("Advantages of the macro actions: +0.50 -0.75.")
    short = anatomy.response(rollout, advantages, 1, Letters())
    assert "+0.00 of KL penalties, then +2.00" in short.alt and "9.00" not in short.alt
    assert short.png().startswith(b"\x89PNG")


def test_clipping_is_one_sided_and_moves_with_the_step():
    ratios = torch.tensor([0.5, 1.0, 1.3, 1.5, 0.5, 0.7, 1.0, 1.5])
    advantages = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0])
    alt = anatomy.clipping(ratios, advantages).alt
    assert "5 in ten where A > 0; 5 in ten where A < 0" in alt
    assert "0 in ten where A > 0; 0 in ten" in anatomy.clipping(ratios, advantages, step=0.0).alt
    assert "2 in ten where A > 0" in anatomy.clipping(ratios, advantages, clip=0.4).alt


def test_curves_of_runs():
    runs = {name: {"score": [0.0, 1.0], "kl": [0.0, 20.0]} for name in ("one", "two")}
    assert "two: score 1.0 and KL 20 at the end" in anatomy.curves(runs).alt
