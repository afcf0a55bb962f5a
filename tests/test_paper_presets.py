"""The presets of the paper's models say what Table 5 says, number by number."""

import pytest

from marlhf import paper
from marlhf.config import get, load_config, presets
from marlhf.experiment import Experiment

PAIRS = paper.table5_models()


@pytest.mark.parametrize("task, model", PAIRS)
def test_a_preset_says_what_the_table_says(task, model):
    config = load_config(f"{task}-{model}")
    want = paper.table5_settings(task, model) | {"data.task": task}
    assert {name: get(config, name) for name in want} == want


def test_tasks_have_their_own_numbers():
    assert paper.table5_settings("webgpt", "gemma-2b")["sft.lr"] == 1e-4
    assert paper.table5_settings("tldr", "gemma-2b")["sft.lr"] == 5e-5
    assert paper.table5_settings("apps", "codegemma-2b")["ppo.macro.n"] == 10
    with pytest.raises(ValueError, match="no gemma-2b on apps"):
        paper.table5_settings("apps", "gemma-2b")


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
