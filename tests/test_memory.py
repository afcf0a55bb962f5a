"""What a preset takes, counted on fake tensors, is what the trainer takes."""

import pytest
import torch

from marlhf.config import ConfigError, load_config
from marlhf.memory import PARTS, Tracker, cache_bytes, estimate, model_shape, rows_at_once
from marlhf.models import load_policy, load_scalar, save_model
from marlhf.ppo import PPOTrainer
from marlhf.rewards import RewardModel
from marlhf.roles import save_adapter
from marlhf.tasks import get_task
from marlhf.text import train_tokenizer

MIB = 2**20
SMALL = {
    "data.size": 160, "data.valid": 8, "data.prompt_tokens": 64, "data.response_tokens": 64,
    "model.tiny.hidden": 256, "model.tiny.layers": 4, "model.tiny.ff": 1024,
    "model.tiny.vocab": 600, "eval.prompts": 8, "eval.batch": 8,
    "ppo.batch": 16, "ppo.updates": 2,
}  # fmt: skip


def measured(folder, **settings):
    """-> (most bytes that one update's tensors took at once, the settings)."""
    config = load_config("tldr-smoke", SMALL, settings)
    data = get_task("tldr").load(config.data)
    tokenizer = train_tokenizer([e.prompt.text + e.response for e in data.sft], 600)
    whole = load_config("tldr-smoke", SMALL)
    save_model(load_policy(whole.model, tokenizer), tokenizer, folder / "sft")
    scalar = load_scalar(config.model, tokenizer, folder / "sft")
    RewardModel(scalar, tokenizer, 64, 64, 0.0, 1.0).save(folder / "rm")
    save_adapter(scalar, folder / "rm", folder / "sft")
    del scalar
    with Tracker() as tracker:
        trainer = PPOTrainer(config, data, folder / "sft", folder / "rm")
        for role in (trainer.model, trainer.reference.model, trainer.reward.model):
            for weight in role.parameters():  # read from a file, by no tensor operation
                tracker.count(weight)
        trainer.tokenizer.eos_token = None  # every response is as long as it may be
        for update in range(2):
            trainer.one_update(update)
    return tracker.peak.total(), load_config("tldr-smoke", SMALL, settings, {
        "model.name": str(folder / "sft")
    })  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ppo.micro_batch": 4},
        {"ppo.micro_batch": 4, "model.gradient_checkpointing": True},
        {"ppo.micro_batch": 4, "model.lora.rank": 8},
        {"ppo.micro_batch": 4, "model.autocast": "bfloat16"},
    ],
    ids=["whole", "micro-batches", "checkpointing", "lora", "autocast"],
)
def test_the_estimate_is_within_a_tenth_of_what_is_measured(settings, tmp_path):
    peak, config = measured(tmp_path, **settings)
    found = estimate(config)
    print(f"measured {peak / MIB:.1f} MiB, estimated {found.peak / MIB:.1f} MiB")
    assert found.peak == pytest.approx(peak, rel=0.1)


def test_weights_that_have_the_products_precision_are_not_cast():
    lora = {**SMALL, "model.lora.rank": 8, "model.dtype": "bfloat16"}
    plain, same = (
        estimate(load_config("tldr-smoke", lora, {"model.autocast": autocast}))
        for autocast in (None, "bfloat16")
    )
    assert same.sampling == plain.sampling
    whole = estimate(load_config("tldr-smoke", SMALL))
    cast = estimate(load_config("tldr-smoke", SMALL, {"model.autocast": "bfloat16"}))
    assert cast.sampling["weights"] - whole.sampling["weights"] == 2 * whole.parameters


def test_the_tracker_counts_what_lives():
    with Tracker() as tracker:
        with tracker.making("weights"):
            one = torch.zeros(1000)
        view = one[10:]
        two = torch.zeros(500)
        del two
        three = view + 1
    assert tracker.now == {"weights": 4000, "activations": 4 * 990}
    assert tracker.peak.total() == 4000 + 4 * 990 and three.numel() == 990


@pytest.mark.parametrize(
    "preset, millions",
    [("tldr-gemma-2b", 2506), ("tldr-gemma-7b", 8538), ("tldr-gemma-2-27b", 27227),
     ("apps-codegemma-7b-it", 8538), ("tldr-smollm2-135m", 134.5), ("tldr-pythia-160m", 162.3)],
)  # fmt: skip
def test_shapes_of_hub_models_have_their_published_sizes(preset, millions):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_shape(load_config(preset)))
    size = sum(p.numel() for p in model.parameters())
    assert size / 1e6 == pytest.approx(millions, rel=1e-3)


def test_gemmas_cache_and_states_by_hand():
    config = load_config("tldr-gemma-2b", "model.dtype=bfloat16", "model.lora.rank=8")
    shape = model_shape(config)
    assert cache_bytes(shape, config) == 2 * 18 * 256 * 1024 * 2
    shape.num_hidden_layers = 1
    full = load_config("tldr-gemma-2b", "ppo.micro_batch=1")
    found = estimate(full)
    assert set(found.update) == set(PARTS)
    # four models in float32, two of them with gradients and two moments
    assert found.update["weights"] == pytest.approx(4 * 4 * 2506.2e6, rel=1e-3)
    assert found.update["optimizer"] == pytest.approx(2 * 2 * 4 * 2506.2e6, rel=1e-3)
    assert found.update["gradients"] == pytest.approx(2 * 4 * 2506.2e6, rel=1e-3)


@pytest.mark.parametrize(
    "setting, processes, rows",
    [
        ("ppo.sampling.rows=null", 1, 16),
        ("ppo.sampling.rows=null", 2, 8),
        ("ppo.sampling.rows=6", 1, 6),
        ("ppo.sampling.rows=6", 4, 4),
        ("ppo.sampling.rows=32", 1, 16),
        ("ppo.sampling.rows=2", 1, 4),  # an evaluation's
        ("eval.batch=32", 4, 8),
    ],
)
def test_rows_sampled_at_once(setting, processes, rows):
    few = ("ppo.batch=16", "eval.prompts=8", "eval.batch=4")
    assert rows_at_once(load_config("tldr-smoke", *few, setting), processes) == rows


def test_keys_and_values_are_those_of_the_rows_sampled_at_once():
    config = load_config("tldr-smoke", "ppo.batch=16", "ppo.sampling.rows=6", "eval.batch=4")
    row = cache_bytes(model_shape(config), config)
    assert row == 2 * 2 * 64 * 4 * (config.data.prompt_tokens + config.data.response_tokens)
    found = estimate(config)
    assert found.sampling["key-value cache"] == 6 * row
    assert found.update["key-value cache"] == 0


def test_the_cache_of_a_compiled_step_is_there_in_the_update_too():
    lengths = ("data.prompt_tokens=100", "data.response_tokens=60", "eval.batch=4")
    config = load_config("tldr-smoke", "ppo.sampling.compile=true", "ppo.sampling.rows=4", *lengths)
    found = estimate(config)
    want = 4 * 2 * 2 * 64 * 4 * 256  # rounded up from 160 tokens
    assert found.update["key-value cache"] == found.sampling["key-value cache"] == want


def test_a_model_whose_kernel_is_eager_is_counted_with_it():
    """Gemma-2's capped scores leave it no other; its scores are kept for the backward pass."""
    config = load_config("tldr-gemma-2-27b", "model.lora.rank=8", "model.dtype=bfloat16")
    shape = model_shape(config)
    assert shape.model_type == "gemma2" and config.model.attention == "eager"
    small = load_config("tldr-smoke", "model.attention=eager")
    assert estimate(small).peak > estimate(load_config("tldr-smoke")).peak


def test_a_model_of_unknown_shape_is_an_error_that_says_where_shapes_are():
    with pytest.raises(ConfigError, match=r"google/gemma-2c.*configs/models.yaml.*gemma-2b"):
        model_shape(load_config("tldr-gemma-2b", "model.name=google/gemma-2c"))
