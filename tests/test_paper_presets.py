"""The presets of the paper's models say what Table 5 says, number by number; which commits of the
hub they take."""

import re

import pytest

from marlhf import paper, stages
from marlhf.config import CONFIGS, get, load_config, presets, read_yaml
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


# ---------------------------------------------------------------- commits of the hub


def test_no_preset_has_the_revision_of_another_model():
    """A preset that names a model says its revision too, null or a commit: it inherits none."""
    found = {}
    for preset in presets():
        own = read_yaml(CONFIGS / "presets" / f"{preset}.yaml").get("model", {})
        if own.get("name", "tiny") != "tiny":
            assert "revision" in own, f"{preset} would take its base's revision"
        model = load_config(preset).model
        found.setdefault(model.revision, set()).add(model.name)
        assert model.revision is None or re.fullmatch("[0-9a-f]{40}", model.revision)
    assert found.pop(None) and found
    assert all(len(names) == 1 for names in found.values()), found


def test_one_model_has_one_revision_in_all_presets():
    found = {}
    for preset in presets():
        model = load_config(preset).model
        found.setdefault(model.name, set()).add(model.revision)
    assert all(len(revisions) == 1 for revisions in found.values()), found


def test_a_ready_model_may_name_its_revision(monkeypatch, tmp_path):
    calls = []

    def snapshot_download(name, revision):
        calls.append((name, revision))
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    config = load_config("tldr-smoke")
    main, pinned = (
        stages.given_spec("rm", name, config) for name in ("owner/rm", "owner/rm@0123abc")
    )
    assert main.hash != pinned.hash  # another model, whatever main is
    assert [stages._downloaded(spec.given) for spec in (main, pinned)] == [tmp_path] * 2
    assert calls == [("owner/rm", None), ("owner/rm", "0123abc")]
