"""Repeated samples of a finished policy: what is drawn, what is kept, what depends on it."""

import pytest
import torch

from marlhf.config import load_config
from marlhf.stages import eval_spec, run_stage, stage_spec

SMALL = {
    "model.tiny.layers": 1,
    "data.size": 80,
    "data.valid": 6,
    "eval.prompts": 6,
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
    assert frame[["rm_score", "true_score", "kl", "length", "finished"]].notna().all().all()


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


def test_the_same_samples_again(ppo, frame, tmp_path, monkeypatch):
    """Another number of samples is another run, which begins with the same ones."""
    ppo.config.repeat.samples = 2
    try:
        fewer = run_stage(eval_spec(ppo)).frame("repeated")
    finally:
        ppo.config.repeat.samples = 3
    columns = ["prompt_id", "temperature", "sample", "rm_score", "true_score", "length"]
    assert fewer[columns].equals(frame.loc[frame["sample"] < 2, columns].reset_index(drop=True))
