"""Repeated samples of a finished policy: what is drawn, what is kept, what depends on it."""

import math

import pytest
import torch

from marlhf.config import load_config
from marlhf.evaluate import Prompts, distinct
from marlhf.models import load_policy
from marlhf.repeated import Witness
from marlhf.sampling import Sampler, keyed_uniforms
from marlhf.stages import eval_spec, load_data, run_stage, stage_spec
from marlhf.text import load_tokenizer

SMALL = {
    "model.tiny.layers": 1,
    "data.size": 80,
    "data.valid": 6,
    "eval.prompts": 6,
    "eval.batch": 2,
    "sft.steps": 4,
    "rm.steps": 2,
    "ppo.updates": 1,
    "data.response_tokens": 24,
    "repeat": {"samples": 3, "temperatures": [0.0, 0.8, 1.0], "prompts": 5, "texts": 2},
}


@pytest.fixture(scope="module")
def ppo(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("MARLHF_RUNS", str(tmp_path_factory.mktemp("runs")))
    spec = stage_spec("ppo", load_config("tldr-smoke", SMALL))
    run_stage(spec)
    yield spec
    patch.undo()


@pytest.fixture(scope="module")
def frame(ppo):
    return run_stage(eval_spec(ppo)).frame("repeated")


def test_as_many_samples_as_asked_for(frame):
    counts = frame.groupby(["temperature", "prompt_id"]).size().unstack()
    assert counts.shape == (3, 5)
    assert (counts.loc[0.0] == 1).all() and (counts.loc[[0.8, 1.0]] == 3).all().all()
    sampled = frame[frame["temperature"] > 0]
    assert set(sampled["sample"]) == {0, 1, 2}
    assert sampled.groupby(["prompt_id", "temperature"])["rm_score"].nunique().gt(1).any()
    numbers = ["rm_score", "true_score", "kl", "ref_nll", "length", "finished"]
    assert frame[numbers].notna().all().all()


def test_texts_of_the_first_prompts_only(frame):
    first = frame["prompt_id"].isin(frame["prompt_id"].unique()[:2])
    assert frame.loc[first, "response"].notna().all()
    assert frame.loc[~first, ["prompt", "response"]].isna().all().all()


def test_sample_0_is_the_one_that_training_evaluated(ppo, frame):
    samples = ppo.run.frame("samples")
    last = samples[samples["update"] == 1].set_index("prompt_id")
    same = frame[(frame["temperature"] == 0.8) & (frame["sample"] == 0)].set_index("prompt_id")
    for column in ("rm_score", "true_score", "kl", "length"):
        torch.testing.assert_close(
            torch.tensor(same[column].to_numpy(float)),
            torch.tensor(last.loc[same.index, column].to_numpy(float)),
            rtol=0, atol=1e-4,
        )  # fmt: skip


def test_the_sft_model_has_no_divergence_from_itself(ppo):
    run = run_stage(eval_spec(ppo, "sft"))
    frame = run.frame("repeated")
    assert frame.loc[frame["temperature"] > 0, "kl"].abs().max() < 1e-4
    summary = run.manifest["summary"]
    assert list(summary["temperatures"]) == ["0", "0.8", "1"]
    assert summary["temperatures"]["0.8"]["prompts"] == 5
    assert "sft" in run.path.name and run.path.parent.name == "eval"


class Uniform:
    """A reference to which each of its tokens is as likely as 1 / V; it counts its passes."""

    def __init__(self, vocabulary):
        self.nat, self.passes = -math.log(vocabulary), []

    def logprobs(self, ids, starts, tokens, mask, *temperatures):
        self.passes.append(temperatures)
        return [mask * self.nat * t for t in temperatures]


def test_the_witness_notes_temperature_1_from_the_same_pass():
    masks = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    reference = Uniform(vocabulary=8)
    witness = Witness(reference)
    for rows, temperature in ((masks[:2], 0.5), (masks[2:], 1.0)):
        (found,) = witness.logprobs(None, None, None, rows, temperature)
        assert torch.equal(found, rows * reference.nat * temperature)
    assert reference.passes == [(0.5, 1.0), (1.0,)]
    assert witness.nll == pytest.approx([3 * math.log(8), math.log(8), 2 * math.log(8)])


def test_surprise_of_the_reference_is_the_samplers_own(ppo):
    """Sampled from the SFT model at temperature 1, what the reference finds is what was drawn."""
    config, folder = ppo.config, ppo.parents["sft"].run.path / "model"
    tokenizer = load_tokenizer(folder)
    prompts = Prompts(load_data(config).valid[:5], tokenizer, config.data.prompt_tokens)
    examples, ids, mask = prompts.batch(range(5))
    names = [example.id for example in examples]
    length = config.data.response_tokens
    uniforms = keyed_uniforms(config.data.seed, "evaluation", 1, names, length)
    policy = load_policy(config.model, tokenizer, folder).eval()
    sample = Sampler(policy, tokenizer, 1.0)(ids, mask, uniforms)
    frame = run_stage(eval_spec(ppo, "sft")).frame("repeated")
    same = frame[(frame["temperature"] == 1.0) & (frame["sample"] == 1)]
    assert same["prompt_id"].tolist() == names
    expected = -sample.full_logprobs.sum(1)
    torch.testing.assert_close(
        torch.tensor(same["ref_nll"].to_numpy(), dtype=torch.float32), expected, rtol=1e-4, atol=0
    )


def test_the_summary_of_a_temperature(ppo):
    ppo.config.repeat.texts = 5
    try:
        run = run_stage(eval_spec(ppo, "sft"))
    finally:
        ppo.config.repeat.texts = 2
    for temperature, rows in run.frame("repeated").groupby("temperature"):
        found = run.manifest["summary"]["temperatures"][f"{temperature:g}"]
        responses = rows.loc[rows["sample"] == 0, "response"].fillna("").tolist()
        assert len(responses) == 5
        for n in (1, 2):
            assert found[f"distinct{n}"] == pytest.approx(distinct(responses, n))
        surprise = rows["ref_nll"].sum() / rows["length"].sum()
        assert found["ref_perplexity"] == pytest.approx(math.exp(surprise))
    assert 0 < found["distinct1"] < found["distinct2"]


def test_the_same_samples_again(ppo, frame, tmp_path, monkeypatch):
    """Another number of samples is another run, which begins with the same ones."""
    ppo.config.repeat.samples = 2
    try:
        fewer = run_stage(eval_spec(ppo)).frame("repeated")
    finally:
        ppo.config.repeat.samples = 3
    columns = ["prompt_id", "temperature", "sample", "rm_score", "true_score", "length"]
    assert fewer[columns].equals(frame.loc[frame["sample"] < 2, columns].reset_index(drop=True))
