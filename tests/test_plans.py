"""`marlhf plan PRESET`, and the refusal to load what cannot fit."""

import re

import pytest

from marlhf import memory, plans
from marlhf.cli import main
from marlhf.config import ConfigError, load_config

GIB = 2**30
SMALL = {  # of four layers, so that an estimate takes a second
    "model_type": "llama", "vocab_size": 8000, "hidden_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 4096,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(memory, "known_models", lambda: {"HuggingFaceTB/SmolLM2-135M": SMALL})


def plan(capsys, *words):
    code = main(["plan", *words])
    return code, capsys.readouterr()


def test_a_presets_plan_on_one_page(capsys):
    code, said = plan(capsys, "tldr-smollm2-135m", "ppo.updates=10")
    assert code == 0
    assert "75,310,080 parameters" in said.out
    for part in ("weights", "gradients", "optimizer", "activations", "key-value cache"):
        assert part in said.out
    assert "64 prompts an update = 1 minibatches of 16 micro-batches of 4" in said.out
    assert "64 prompts sampled at once, 64 in an evaluation" in said.out
    assert "10 updates: 640 responses of at most 512 tokens" in said.out
    assert "not measured" in said.out
    totals = [float(line.split()[-1]) for line in said.out.splitlines() if "  update" in line]
    assert len(totals) == 4 and max(totals[1:]) < totals[0]
    ways = ("as the preset says", "in shares on 8 GPUs (FSDP)", "model.lora.rank=64", "(DDP)")
    found = [said.out.index(way) for way in ways]
    assert found == sorted(found)


def test_measured_minutes_give_hours_and_nothing_else_does(capsys):
    code, said = plan(capsys, "tldr-tiny")
    assert code == 0
    assert re.search(r"hours: 0\.\d\d for a chain \(minutes: sft", said.out)
    assert "120,640 parameters" in said.out and "MiB" in said.out


def test_wrong_words_are_one_line(capsys):
    code, said = plan(capsys, "tldr-smollm2-135m", "ppo.lam=3")
    assert code == 2 and said.err.endswith("ppo.lam must be at most 1, not 3.0\n")
    code, said = plan(capsys, "nonesuch")
    assert code == 2 and "no experiment and no preset 'nonesuch'" in said.err


def test_what_cannot_fit_says_so_and_what_would():
    config = load_config("tldr-smollm2-135m")
    plans.require_fit(config, 24 * GIB)
    with pytest.raises(ConfigError) as caught:
        plans.require_fit(config, 3 * GIB)
    said = str(caught.value)
    need = float(re.search(r"needs ([\d.]+) GiB", said)[1])
    would = float(re.search(r"would take ([\d.]+)", said)[1])
    assert would <= 3 < need
    settings = re.search(r"has 3\.0: (.*?) (on|would)", said)[1].split()
    plans.require_fit(load_config("tldr-smollm2-135m", *settings), 3 * GIB)
    with pytest.raises(ConfigError, match="take a smaller model"):
        plans.require_fit(config, GIB // 8)


def test_where_keys_and_values_alone_do_not_fit_fewer_rows_would():
    config = load_config(
        "tldr-smollm2-135m", "ppo.batch=512", "eval.batch=128", "model.autocast=null"
    )
    with pytest.raises(ConfigError) as caught:
        plans.require_fit(config, 6 * GIB)
    said = re.search(r"has 6\.0: (.*) would take ([\d.]+)", str(caught.value))
    rows = int(re.fullmatch(r"ppo.sampling.rows=(\d+) eval.batch=\1", said[1])[1])
    assert float(said[2]) <= 6
    fits = plans.changed(config, said[1].split())
    assert (fits.ppo.sampling.rows, fits.eval.batch, fits.ppo.batch) == (rows, rows, 512)
    assert plans.fewer_rows(fits, 1, 6 * GIB) == ()
    more = plans.changed(fits, [f"ppo.sampling.rows={2 * rows}"])
    assert plans.fewer_rows(more, 1, 6 * GIB) == (f"ppo.sampling.rows={rows}",)
    assert plans.fewer_rows(config, 1, 2 * GIB) is None  # the update does not fit either


def test_a_model_of_unknown_shape_is_tried():
    assert plans.require_fit(load_config("tldr-small", "model.name=some/model"), 1) is None
    assert plans.require_fit(load_config("tldr-tiny"), 1) is None
