"""Settings: presets, overrides, what is refused and in which words."""

import dataclasses

import pytest

from marlhf import config as module
from marlhf.config import KEYS, Config, ConfigError, get, load_config, needs_rm, presets, to_dict


def write(folder, name, text):
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("preset", presets())
def test_every_preset_loads_and_is_named(preset):
    config = load_config(preset)
    assert config.name == preset
    assert Config(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Config)}) == config


def test_every_key_has_a_line_of_help():
    assert all(key.help for key in KEYS.values())
    assert {"ppo.lam", "model.tiny.hidden", "ppo.macro.n", "seed"} <= KEYS.keys()


def test_overrides_apply_in_order_and_take_dots_or_nesting():
    config = load_config(
        "tldr-tiny", "ppo.lam=0.9", {"ppo.lam": 0.99, "ppo": {"macro": {"n": 7}}}, "seed=3"
    )
    assert (config.ppo.lam, config.ppo.macro.n, config.seed) == (0.99, 7, 3)
    assert load_config("tldr-tiny").ppo.macro.n == 5  # the preset itself is untouched


def test_values_are_read_as_their_key_wants():
    config = load_config(
        "tldr-tiny",
        "ppo.lam=1",
        "sft.lr=1e-3",
        "ppo.sampling.top_k=50",
        "ppo.macro.lengths=[1,2]",
        "ppo.whiten=true",
        "model.revision=12e4",
        "data.source=a=b",
    )
    assert isinstance(config.ppo.lam, float)
    assert config.sft.lr == 0.001
    assert config.ppo.sampling.top_k == 50
    assert config.ppo.macro.lengths == [1, 2]
    assert config.ppo.whiten is True
    assert config.model.revision == "12e4"  # a commit, not a number
    assert config.data.source == "a=b"
    assert load_config("tldr-tiny", "ppo.sampling.top_k=null").ppo.sampling.top_k is None


@pytest.mark.parametrize(
    "override, words",
    [
        ("ppo.lamb=1", "unknown key 'ppo.lamb'. Did you mean ppo.lam"),
        ("lam=1", "Did you mean ppo.lam"),
        ("checkpoint=1", "unknown key 'checkpoint'"),
        ("ppo=1", "ppo is a section"),
        ("ppo.lam", "not of the form key=value"),
        ("ppo.lam=high", "ppo.lam must be a number, not 'high'"),
        ("ppo.batch=6.5", "ppo.batch must be an integer, not 6.5"),
        ("ppo.whiten=often", "ppo.whiten must be true or false"),
        ("ppo.macro.lengths=3", "ppo.macro.lengths must be a list of integers"),
        ("ppo.macro.lengths=[3", "cannot read"),
        ("ppo.sampling.top_k=few", "ppo.sampling.top_k must be an integer or null"),
        ("ppo.lam=", "ppo.lam must be a number"),
        ("ppo.lr=nan", "ppo.lr must be a finite number"),
        ("ppo.lam=1.5", "ppo.lam must be at most 1"),
        ("ppo.clip=0", "ppo.clip must be above 0"),
        ("ppo.macro.n=0", "ppo.macro.n must be at least 1"),
        ("ppo.macro.lengths=[]", "ppo.macro.lengths must hold integers above 0"),
        ("ppo.macro.lengths=[2,0]", "ppo.macro.lengths must hold integers above 0"),
        ("ppo.macro.termination=fixd", "unknown value 'fixd'. Did you mean fixed?"),
        ("ppo.macro.value_weights=sum", "ppo.macro.value_weights: unknown value 'sum'"),
        ("ppo.minibatches=3", "ppo.batch (64) must be a multiple of ppo.minibatches (3)"),
        ("ppo.micro_batch=48", "must be a multiple of ppo.micro_batch (48)"),
        ("sft.micro_batch=5", "sft.batch (32) must be a multiple of sft.micro_batch (5)"),
        ("data.split=[.5,.5,.5]", "sums to 1.5, more than 1"),
        ("data.split=[.5,.5]", "data.split must be three shares"),
        ("data.split=[.2,0,.8]", "no rows for the reward model"),
        ("eval.prompts=999", "eval.prompts (999) exceeds data.valid (256)"),
        ("model.tiny.heads=5", "model.tiny.hidden (64) must be a multiple of model.tiny.heads"),
        ("data.source=${home}", "home"),
    ],
)
def test_bad_overrides_are_refused_in_one_line(override, words):
    with pytest.raises(ConfigError) as error:
        load_config("tldr-tiny", override)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_no_reward_model_where_the_task_scores():
    settings = ("ppo.reward=task", "ppo.critic_init=policy", "data.split=[.2,0,.8]")
    assert not needs_rm(load_config("tldr-tiny", *settings))
    assert needs_rm(load_config("tldr-tiny", "ppo.reward=task"))  # the critic starts from it


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown preset 'tldr-tny'\. Did you mean tldr-tiny"):
        load_config("tldr-tny")


def test_a_preset_inherits_from_its_base(tmp_path):
    path = write(tmp_path, "mine", "base: tldr-smoke\nppo: {updates: 7}\n")
    mine, base = load_config(path), load_config("tldr-smoke")
    assert (mine.name, mine.ppo.updates, mine.ppo.batch) == ("mine", 7, base.ppo.batch)


@pytest.mark.parametrize(
    "text, words",
    [
        ("ppo: {lamb: 1}", "mine.yaml: unknown key 'ppo.lamb'"),
        ("ppo: {lam: a}", "mine.yaml: ppo.lam must be a number"),
        ("ppo: [1", "mine.yaml: cannot be read"),
        ("- 1", "must hold a mapping"),
        ("base: tldr-tny", "unknown preset 'tldr-tny'"),
    ],
)
def test_a_bad_preset_names_its_file(tmp_path, text, words):
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, "mine", text))
    assert words in str(error.value)


def test_a_preset_cannot_be_its_own_base(tmp_path, monkeypatch):
    (tmp_path / "presets").mkdir()
    write(tmp_path / "presets", "one", "base: two")
    write(tmp_path / "presets", "two", "base: one")
    monkeypatch.setattr(module, "CONFIGS", tmp_path)
    with pytest.raises(ConfigError, match="its own base: one -> two -> one"):
        load_config("one")


def test_dict_and_get_follow_dotted_names():
    config = load_config("tldr-tiny")
    assert get(config, "ppo.macro.n") == to_dict(config)["ppo"]["macro"]["n"] == 5


def test_a_presets_commit_is_of_the_presets_model():
    def revision(*overrides):
        return load_config("tldr-gemma-2b", *overrides).model.revision

    commit = revision()
    assert commit and revision({"model.name": "google/gemma-2b"}) == commit
    assert revision("model.name=owner/model") is revision({"model": {"name": "a/b"}}) is None
    assert revision("model.revision=0123abc", {"model.name": "owner/model"}) == "0123abc"
