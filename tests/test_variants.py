"""The trainers that depart from Alg. 1: the last token alone, the empty macro step, a parser."""

import pytest
import torch

from marlhf.config import ConfigError, load_config
from marlhf.macro import macro_gae
from marlhf.models import load_policy, load_scalar, save_model
from marlhf.ppo import PPOTrainer
from marlhf.runs import Run
from marlhf.segment import FixedNgram, Perplexity, Token, Whole, check_segments
from marlhf.tasks import get_task
from marlhf.text import train_tokenizer
from marlhf.variants import LastAlone, VariantTrainer, gae_with_empty_step, train_variant

SMALL = {
    "data.size": 160,
    "data.valid": 8,
    "data.response_tokens": 24,
    "model.tiny.hidden": 32,
    "model.tiny.ff": 32,
    "eval.prompts": 8,
    "eval.every": 2,
    "ppo.batch": 8,
    "ppo.updates": 3,
    "ppo.checkpoint_every": 1,
}
PARSING = {"ppo.macro.termination": "parsing"}
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 1, 1], [0, 1, 0, 0]], dtype=torch.bool)


# The last token alone


@pytest.mark.parametrize(
    "segmenter, expected",
    [
        (Whole(), [[0, 0, 0, 1], [-1, 0, 1, -1], [0, -1, 0, 1], [-1, 0, -1, -1]]),
        (FixedNgram(3), [[0, 0, 0, 1], [-1, 0, 1, -1], [0, -1, 0, 1], [-1, 0, -1, -1]]),
        (FixedNgram(2), [[0, 0, 1, 2], [-1, 0, 1, -1], [0, -1, 0, 1], [-1, 0, -1, -1]]),
        (Token(), [[0, 1, 2, 3], [-1, 0, 1, -1], [0, -1, 1, 2], [-1, 0, -1, -1]]),
    ],
)
def test_last_alone(segmenter, expected):
    segments = LastAlone(segmenter)(MASK.long(), MASK)
    check_segments(segments, MASK)
    assert segments.tolist() == expected


def test_last_alone_hands_on_what_its_condition_reads():
    logprobs = -torch.tensor([[2.0, 1.0, 3.0, 1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    segments = LastAlone(Perplexity())(mask.long(), mask, ref_logprobs=logprobs)
    assert segments.tolist() == [[0, 0, 1, 2]]


# The empty step


def rows_by_loop(rewards, values, segments, n, gamma, lam):
    """Advantages and returns of one row of lists without padding, step by step."""
    steps = []  # (reward, value, tokens) of each macro action
    for m in range(segments[-1] + 1):
        own = [t for t, s in enumerate(segments) if s == m]
        value = sum(values[t] for t in own) / len(own)
        steps.append([sum(rewards[t] for t in own), value, len(own)])
    if (len(segments) - 1) % n == 0:
        steps.insert(len(steps) - 1, [0.0, 0.0, 0])
    found, after, following = [], 0.0, 0.0
    for reward, value, length in reversed(steps):
        after = reward + gamma**length * following - value + gamma**length * lam * after
        following = value
        found.insert(0, (after, after + value))
    if (len(segments) - 1) % n == 0:
        found.pop(-2)
    return [found[m] for m in segments]


def test_the_empty_step_by_hand():
    """Three tokens, n = 1, lambda = 1/2, values 1, 2, 4 and a reward of 8 at the end:

    last   A = 8 - 4 = 4
    empty  A = V_last - 0 + A_last / 2 = 4 + 2 = 6
    second A = 0 + 0 - 2 + 6 / 2 = 1        (without the empty step 4 - 2 + 4 / 2 = 4)
    first  A = 2 - 1 + 1 / 2 = 1.5
    """
    row = {"rewards": torch.tensor([[0.0, 0, 8]]), "values": torch.tensor([[1.0, 2, 4]])}
    segments = torch.tensor([[0, 1, 2]])
    advantages, returns = gae_with_empty_step(**row, segments=segments, n=1, lam=0.5)
    assert advantages.tolist() == [[1.5, 1.0, 4.0]]
    assert returns.tolist() == [[2.5, 3.0, 8.0]]
    plain, _ = macro_gae(**row, segments=segments, lam=0.5)
    assert plain.tolist() == [[3.0, 4.0, 4.0]]


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8)])
def test_the_empty_step_on_ragged_rows_is_the_loop(n, gamma, lam):
    rng = torch.Generator().manual_seed(n)
    rewards, values = torch.randn(2, 7, 9, generator=rng, dtype=torch.float64)
    mask = torch.zeros(7, 9, dtype=torch.bool)
    for row, length in enumerate((1, 2, 3, 4, 5, 7, 9)):
        mask[row, torch.randperm(9, generator=rng)[:length]] = True
    segments = LastAlone(FixedNgram(n))(mask.long(), mask)
    found = gae_with_empty_step(rewards, values, segments, n, gamma, lam)
    with_step = 0
    for row in range(len(mask)):
        parts = [x[row][mask[row]].tolist() for x in (rewards, values, segments)]
        expected = torch.tensor(rows_by_loop(*parts, n, gamma, lam), dtype=torch.float64)
        for got, want in zip(found, expected.unbind(1), strict=True):
            torch.testing.assert_close(got[row][mask[row]], want)
            assert not got[row][~mask[row]].any()
        with_step += (len(parts[0]) - 1) % n == 0
    assert with_step > 0 and (with_step < 7 or n == 1)


def test_the_empty_step_needs_its_conditions():
    for settings in ({}, {"last_alone": True, "termination": "random"}):
        settings = {f"ppo.macro.{key}": value for key, value in settings.items()}
        with pytest.raises(ConfigError, match="empty_step needs ppo.macro.last_alone"):
            load_config("tldr-smoke", settings, {"ppo.macro.empty_step": True})


# The trainer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(data, folder with a run's model: a policy, the same of a scalar model), untrained."""
    folder = tmp_path_factory.mktemp("models")
    config = load_config("tldr-smoke", SMALL)
    data = get_task("tldr").load(config.data)
    tokenizer = train_tokenizer([e.prompt.text + e.response for e in data.sft], 400)
    save_model(load_policy(config.model, tokenizer), tokenizer, folder / "policy" / "model")
    scalar = load_scalar(config.model, tokenizer, folder / "policy" / "model")
    save_model(scalar, tokenizer, folder / "scalar" / "model")
    return data, folder / "policy", folder / "scalar"


def make(world, kind=VariantTrainer, run=None, **settings):
    data, policy, scalar = world
    options = {f"ppo.{key.replace('__', '.')}": value for key, value in settings.items()}
    config = load_config("tldr-smoke", SMALL, options)
    return kind(config, data, policy / "model", scalar / "model", run)


def step(trainer):
    rollout = trainer.score(trainer.rollout(0))
    advantages = trainer.advantages(rollout)
    return rollout, advantages, trainer.update(rollout, advantages)


def as_demonstrations(trainer, rollout):
    """The rollout with texts of the twin in the place of what an untrained policy writes."""
    texts = [example.response for example in trainer.data.ppo[: len(rollout.tokens)]]
    ids = [trainer.tokenizer(text)["input_ids"][: rollout.tokens.shape[1]] for text in texts]
    for row, found in enumerate(ids):
        rollout.tokens[row, : len(found)] = torch.tensor(found)
        rollout.mask[row] = torch.arange(rollout.tokens.shape[1]) < len(found)
    return rollout


def test_switched_off_every_number_is_the_trainers(world):
    (_, one, left), (_, other, right) = step(make(world)), step(make(world, PPOTrainer))
    assert torch.equal(one.advantages, other.advantages)
    assert left == right


@pytest.mark.parametrize("ratio", ["token", "macro"])
def test_parsing_trains_with_either_ratio(world, ratio):
    trainer = make(world, macro__termination="parsing", macro__ratio=ratio, macro__last_alone=True)
    assert trainer.config.ppo.macro.termination == "parsing"
    rollout, advantages, stats = step(trainer)
    assert stats["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert trainer.constituency.sentences >= len(rollout.tokens)
    check_segments(advantages.segments, rollout.mask)
    rollout = as_demonstrations(trainer, rollout)
    segments = trainer.advantages(rollout).segments
    assert 1 < rollout.mask.sum() / (segments.amax(1) + 1).sum() < 5  # tokens a macro action


def test_empty_step_through_the_trainer_with_whitening(world):
    settings = {"macro__termination": "token", "macro__last_alone": True}
    trainer = make(world, **settings, macro__empty_step=True)
    rollout = trainer.score(trainer.rollout(0))
    found = trainer.advantages(rollout)
    for row in range(len(rollout.tokens)):
        keep = rollout.mask[row]
        parts = [x[row][keep].tolist() for x in (found.rewards, rollout.values, found.segments)]
        expected = torch.tensor(rows_by_loop(*parts, 1, 1.0, trainer.ppo.lam))
        torch.testing.assert_close(
            found.advantages[row][keep], expected[:, 0], rtol=1e-4, atol=1e-5
        )
    trainer.ppo.whiten = True
    white = trainer.advantages(rollout).advantages[rollout.mask]
    assert float(white.mean()) == pytest.approx(0, abs=1e-5)
    assert float(white.std()) == pytest.approx(1, abs=0.01)


def timeless(run, table):
    frame = run.frame(table)
    return frame.drop(columns=[name for name in frame if "sec" in name])


def test_a_killed_run_ends_as_if_it_had_not_been(world, tmp_path, monkeypatch):
    """Tables, weights and the count of sentences, bit for bit."""
    data, policy, scalar = world
    config = load_config("tldr-smoke", SMALL, PARSING, {"ppo.macro.last_alone": True})

    def train(folder):
        run = Run.open("ppo", "parsing", {"stage": "ppo", "config": {}}, root=folder)
        try:
            train_variant(config, data, run, policy, scalar)
        finally:
            run.close()
        return run

    whole = train(tmp_path / "whole")
    kept, calls = VariantTrainer.update, []

    def killed(self, rollout, advantages):
        calls.append(rollout.update)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return kept(self, rollout, advantages)

    monkeypatch.setattr(VariantTrainer, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed")
    resumed = train(tmp_path / "killed")
    assert calls == [0, 1, 2, 2]
    for table in ("metrics", "evals", "samples", "parses"):
        assert timeless(whole, table).equals(timeless(resumed, table)), table
    for name in ("model", "critic"):
        file = f"{name}/model.safetensors"
        assert (whole.path / file).read_bytes() == (resumed.path / file).read_bytes()
    found = whole.manifest["summary"]["parses"]
    assert found == resumed.manifest["summary"]["parses"]
    assert found["sentences"] == whole.frame("parses")["sentences"].sum() > 0
    assert found["share"] == found["fallbacks"] / found["sentences"]
