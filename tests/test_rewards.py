"""Rewards: the score of a text, whatever its batch; the scale, and where it is kept."""

import json

import numpy as np
import pytest
import torch
import transformers

from marlhf.config import load_config
from marlhf.models import load_policy, load_scalar, save_model
from marlhf.rewards import RewardModel, TrueScore
from marlhf.tasks.base import Task
from marlhf.text import Example, Prompt, encode_prompt, encode_response, train_tokenizer

TOLERANCE = 2e-5  # float32 sums in another order
WORDS = ["the cat sat", "a dog ran far away", "bees", "an old cow stood in the rain all day"]


def example(number, body):
    return Example(f"p{number}", Prompt("POST: ", body, "\nTL;DR:"), "", {})


EXAMPLES = [example(i, text) for i, text in enumerate(WORDS)]
RESPONSES = [" cat", " a dog ran", "", " it rains"]
COLUMNS = {"finished": [True, False, True, False], "length": [3, 5, 1, 4]}


@pytest.fixture(scope="module")
def config():
    small = {"model.tiny.hidden": 32, "model.tiny.ff": 32, "data.prompt_tokens": 40}
    return load_config("tldr-smoke", small)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(WORDS * 3, 290)


@pytest.fixture(scope="module")
def folder(config, tokenizer, tmp_path_factory):
    """A scalar model that transformers wrote: no scale beside it."""
    folder = tmp_path_factory.mktemp("scalar")
    save_model(load_policy(config.model, tokenizer), tokenizer, folder)
    scalar = load_scalar(config.model, tokenizer, folder, seed=1)
    with torch.no_grad():
        scalar.score.weight.mul_(10)
    save_model(scalar, tokenizer, folder)
    return folder


@pytest.fixture
def reward(config, folder):
    return RewardModel.load(folder, config)


def test_a_model_without_a_scale_keeps_its_own_score(reward, folder):
    """Also that the score is read at the last token, and where an end token stands."""
    assert (reward.mean, reward.std) == (0.0, 1.0)
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder).eval()
    scores = reward(EXAMPLES, RESPONSES, COLUMNS)
    assert scores.dtype == np.float32
    for i, text in enumerate(RESPONSES):
        ids = encode_prompt(EXAMPLES[i].prompt, reward.tokenizer, 40)
        ids += reward.tokenizer(text).input_ids
        ids += [reward.tokenizer.eos_token_id] * COLUMNS["finished"][i]
        own = model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits
        assert scores[i] == pytest.approx(own.item(), abs=TOLERANCE)


def test_finished_is_seen_in_the_score(reward):
    other = reward(EXAMPLES, RESPONSES, {"finished": [not f for f in COLUMNS["finished"]]})
    assert (abs(other - reward(EXAMPLES, RESPONSES, COLUMNS)) > 1e-3).all()


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batch_and_order_change_no_score(reward, batch):
    """To 2e-5 in float32."""
    want = reward(EXAMPLES, RESPONSES, COLUMNS)
    reward.batch = batch
    order = [2, 0, 3, 1]
    got = reward(
        [EXAMPLES[i] for i in order],
        [RESPONSES[i] for i in order],
        {"finished": [COLUMNS["finished"][i] for i in order]},
    )
    np.testing.assert_allclose(got, want[order], atol=TOLERANCE)


def test_standardised_scores_have_mean_0_and_spread_1_and_survive_saving(reward, config, tmp_path):
    plain = reward(EXAMPLES, RESPONSES, COLUMNS)
    reward.standardise(EXAMPLES, RESPONSES, COLUMNS)
    scores = reward(EXAMPLES, RESPONSES, COLUMNS)
    assert scores.mean() == pytest.approx(0, abs=1e-5)
    assert scores.std(ddof=1) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(scores, (plain - plain.mean()) / plain.std(ddof=1), atol=1e-5)

    reward.standardise(EXAMPLES, RESPONSES, COLUMNS)  # from the raw score again, not its own
    assert reward.mean == pytest.approx(float(plain.mean()), abs=1e-6)
    reward.save(tmp_path)
    saved = json.loads((tmp_path / "reward.json").read_text())
    assert saved == {"mean": reward.mean, "std": reward.std}
    again = RewardModel.load(tmp_path, config)
    np.testing.assert_array_equal(again(EXAMPLES, RESPONSES, COLUMNS), scores)


def test_scores_without_spread_or_not_finite_are_errors(reward):
    same = [EXAMPLES[0]] * 3, [" cat"] * 3, {"finished": [True] * 3}
    with pytest.raises(ValueError, match="no spread"):
        reward.standardise(*same)
    with torch.no_grad():
        reward.model.score.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="'p0' nan"):
        reward.standardise(EXAMPLES, RESPONSES, COLUMNS)


def test_it_learns_nothing_and_leaves_the_mode(reward):
    assert not any(p.requires_grad for p in reward.model.parameters())
    reward.model.train()
    reward(EXAMPLES, RESPONSES, COLUMNS)
    assert reward.model.training


def test_adapters_of_the_policy_are_not_the_reward_models(folder):
    config = load_config("tldr-smoke", {"model.lora.rank": 4})
    assert not hasattr(RewardModel.load(folder, config).model, "peft_config")


def test_its_own_tokenizer_and_budgets(config, tokenizer, folder, tmp_path):
    """A reward model splits the text in its own way, and cuts what is too long."""
    reward = RewardModel.load(folder, config)
    reward.response_tokens = 3
    ids = reward.encode(EXAMPLES[0].prompt, (" cat sat in the rain", True), (" a", True))
    prompt = encode_prompt(EXAMPLES[0].prompt, tokenizer, 40)
    assert [row[: len(prompt)] for row in ids] == [prompt, prompt]
    assert len(ids[0]) == len(prompt) + 3
    assert ids[0][-1] != tokenizer.eos_token_id  # it was cut, so it has no end
    assert ids[1][len(prompt) :] == encode_response(" a", tokenizer, 3)
    assert ids[1][-1] == tokenizer.eos_token_id


def test_columns_of_another_length_are_an_error(reward):
    with pytest.raises(ValueError, match="zip"):
        reward(EXAMPLES, RESPONSES[:2], COLUMNS)


def test_folder_without_a_model_is_one_error(config, tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        RewardModel.load(tmp_path, config)


class Counting(Task):
    name = "counting"

    def true_score(self, example, response, finished):
        return len(response) - (not finished) if response else None


def test_true_score_is_the_tasks():
    scores = TrueScore(Counting())(EXAMPLES[:2], RESPONSES[:2], {"finished": [True, False]})
    assert scores.dtype == np.float32
    assert scores.tolist() == [4, 9]


def test_a_task_may_judge_many_at_once():
    class Batch(Task):
        def true_scores(self, examples, responses, finished):
            return [len(responses)] * len(examples)

    assert TrueScore(Batch())(EXAMPLES[:2], RESPONSES[:2], COLUMNS).tolist() == [2, 2]


def test_a_task_without_truth_is_one_error():
    with pytest.raises(ValueError, match="'counting' has no score of its own for prompt 'p2'"):
        TrueScore(Counting())(EXAMPLES, RESPONSES, COLUMNS)
