"""FSDP on two processes (gloo): the same run as on one, resumed too; weights are in shares."""

from pathlib import Path

import pytest
import torch
from test_processes import SETTINGS, alone, compare, launch, tables  # noqa: F401

from marlhf import placement
from marlhf.config import load_config

SCRIPT = Path(__file__).with_name("sharded.py")


def sharded(root, *options, **environment):
    return launch(root, "ppo", *SETTINGS, "ppo.micro_batch=2", *options, code=SCRIPT, **environment)


@pytest.mark.slow
def test_shares_do_what_whole_weights_do(alone, tmp_path):  # noqa: F811
    code, out, err = sharded(tmp_path)
    assert code == 0, err[-3000:]
    assert out.count("SHARES True {torch.float32}") == 2
    assert out.count("WHOLE {(False, torch.float32)}") > 10 and out.count("(True,") == 0
    compare(tables(alone), tables(tmp_path))
    from safetensors.torch import load_file

    for name in ("sft/*/model", "rm/*/model", "ppo/*/model", "ppo/*/critic"):
        one, two = (next(Path(root).glob(name)) for root in (alone, tmp_path))
        one, two = (load_file(folder / "model.safetensors") for folder in (one, two))
        assert one.keys() == two.keys()
        for key, weight in one.items():
            torch.testing.assert_close(two[key], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_broken_run_in_shares_goes_on(alone, tmp_path):  # noqa: F811
    every = [f"{stage}.checkpoint_every=1" for stage in ("sft", "rm", "ppo")]
    for place in ("sft", "after sft", "ppo"):
        code, _, err = sharded(tmp_path, *every, STOP=place)
        assert code != 0 and "stopped here" in err
    code, _, err = sharded(tmp_path, *every)
    assert code == 0, err[-3000:]
    compare(tables(alone), tables(tmp_path))


@pytest.mark.slow
def test_shares_stay_float32_where_products_are_bfloat16(tmp_path):
    code, out, err = sharded(tmp_path, "model.autocast=bfloat16", "ppo.updates=1", "eval.every=1")
    assert code == 0, err[-3000:]
    assert out.count("SHARES True {torch.float32}") == 2
    assert out.count("WHOLE {(False, torch.bfloat16)}") > 10


def test_lora_in_shares_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = load_config("tldr-smoke", "model.lora.rank=4")
    with pytest.raises(ValueError, match="with LoRA take DDP"):
        placement.make_accelerator(config.model)
