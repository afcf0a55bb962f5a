"""The presets of the paper's models say what Table 5 says, number by number."""

import pytest

from marlhf.config import get, load_config, presets
from marlhf.experiment import Experiment

# Table 5, a column a model; where a task has its own number, it stands under the task.
TABLE = {
    "gemma-2b": {
        "model.name": "google/gemma-2b",
        "sft.batch": 512, "sft.epochs": 3, "sft.lr": 5e-5,
        "rm.batch": 64, "rm.lr": 1e-5,
        "ppo.batch": 256, "ppo.lr": 1.5e-5, "ppo.critic_lr": 1.5e-5,
        "ppo.kl_coef": 0.05, "ppo.warmup": 200,
        "webgpt": {"sft.batch": 64, "sft.lr": 1e-4, "rm.batch": 32, "rm.lr": 2e-5},
    },
    "gemma-7b": {
        "model.name": "google/gemma-7b",
        "sft.batch": 128, "sft.epochs": 1, "sft.lr": 2e-5,
        "rm.batch": 128, "rm.lr": 1e-6,
        "ppo.batch": 256, "ppo.lr": 1e-6, "ppo.critic_lr": 1e-6,
        "ppo.kl_coef": 0.05, "ppo.warmup": 200,
        "tldr": {"ppo.kl_coef": 0.01},
        "hh": {"rm.batch": 64},
        "webgpt": {"sft.epochs": 5, "rm.batch": 32, "ppo.kl_coef": 0.1},
    },
    "gemma-2-27b": {
        "model.name": "google/gemma-2-27b",
        "sft.batch": 128, "sft.epochs": 3, "sft.lr": 5e-6,
        "rm.batch": 128, "rm.lr": 8e-6,
        "ppo.batch": 256, "ppo.lr": 7e-7, "ppo.critic_lr": 1e-6,
        "ppo.kl_coef": 0.1, "ppo.warmup": 0,
    },
    "codegemma-2b": {
        "model.name": "google/codegemma-2b",
        "sft.batch": 16, "sft.epochs": 1, "sft.lr": 5e-6,
        "ppo.batch": 16, "ppo.lr": 5e-7, "ppo.critic_lr": 5e-5,
        "ppo.kl_coef": 0.05, "ppo.warmup": 20,
    },
    "codegemma-7b-it": {
        "model.name": "google/codegemma-7b-it",
        "sft.batch": 32, "sft.epochs": 1, "sft.lr": 2e-6,
        "ppo.batch": 16, "ppo.lr": 5e-7, "ppo.critic_lr": 5e-5,
        "ppo.kl_coef": 0.05, "ppo.warmup": 20,
    },
}  # fmt: skip
ALL = {
    "data.source": "hub",
    "sft.schedule": "cosine", "sft.warmup": 0.1, "rm.schedule": "cosine", "rm.warmup": 0.1,
    "rm.epochs": 1, "ppo.passes": 1, "ppo.clip": 0.2, "ppo.lam": 0.95, "ppo.gamma": 1.0,
    "ppo.macro.termination": "fixed", "data.response_tokens": 512,
}  # fmt: skip
TEXT = {
    "data.prompt_tokens": 512, "ppo.sampling.temperature": 0.8, "ppo.sampling.top_k": 50,
    "data.split": [0.2, 0.4, 0.4], "data.seed": 1234, "ppo.macro.n": 5, "ppo.reward": "rm",
    "ppo.critic_init": "rm",
}  # fmt: skip
CODE = {
    "data.prompt_tokens": 600, "ppo.sampling.temperature": 1.0, "ppo.sampling.top_k": 5,
    "data.split": [0.2, 0.0, 0.8], "data.seed": 1234, "ppo.macro.n": 10, "ppo.reward": "task",
}  # fmt: skip
PAIRS = [(t, m) for m in TABLE for t in (["apps"] if "code" in m else ["tldr", "hh", "webgpt"])]


@pytest.mark.parametrize("task, model", PAIRS)
def test_a_preset_says_what_the_table_says(task, model):
    config = load_config(f"{task}-{model}")
    column = dict(TABLE[model])
    own = column.pop(task, {})
    for other in ("tldr", "hh", "webgpt"):
        column.pop(other, None)
    want = ALL | (CODE if task == "apps" else TEXT) | column | own | {"data.task": task}
    found = {name: get(config, name) for name in want}
    assert found == want


def test_no_preset_of_the_papers_is_left_out():
    named = {p for p in presets() if "gemma" in p}
    assert named == {f"{task}-{model}" for task, model in PAIRS}


@pytest.mark.parametrize("model", ["pythia-160m", "smollm2-135m"])
def test_small_models_of_other_families_need_no_licence(model):
    for task in ("tldr", "hh", "webgpt"):
        config = load_config(f"{task}-{model}")
        assert "gemma" not in config.model.name and config.data.task == task


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_batches_divide_among_processes(processes):
    for task, model in PAIRS:
        config = load_config(f"{task}-{model}")
        assert config.ppo.batch % processes == 0
        for stage in (config.sft, config.rm) if task != "apps" else (config.sft,):
            assert stage.batch % (stage.micro_batch * processes) == 0


def test_scales_choose_the_presets():
    assert {c.name for c in Experiment.load("fig02_tldr", "gemma-2b").configs.values()} == {
        "tldr-gemma-2b"
    }
    for scale, preset in (("gemma-2b", "apps-codegemma-2b"), ("gemma-7b", "apps-codegemma-7b-it")):
        configs = Experiment.load("table3_apps", scale).configs.values()
        assert {c.name for c in configs} == {preset}
    for name in ("fig13_hh", "fig15_webgpt"):
        for scale in ("gemma-2b", "gemma-7b", "pythia-160m", "smollm2-135m"):
            assert Experiment.load(name, scale).configs
