"""Weights in shares (FSDP, two processes, gloo): the same run as on one, resumed too. Precision."""

from pathlib import Path

import pytest
import torch
from test_ppo import make, world  # noqa: F401
from test_processes import SETTINGS, alone, compare, launch, tables  # noqa: F401

from marlhf import placement
from marlhf.config import load_config
from marlhf.memory import estimate
from marlhf.stages import entry_modules, stage_spec

SCRIPT = Path(__file__).with_name("sharded.py")


def sharded(root, *options, **environment):
    return launch(root, "ppo", *SETTINGS, "ppo.micro_batch=2", *options, code=SCRIPT, **environment)


@pytest.mark.slow
def test_shares_do_what_whole_weights_do(alone, tmp_path):  # noqa: F811
    code, out, err = sharded(tmp_path)
    assert code == 0, err[-3000:]
    assert out.count("SHARES True {torch.float32}") == 2
    assert out.count("WHOLE {(False, torch.float32)}") > 10 and out.count("(True,") == 0
    found = estimate(load_config("tldr-smoke", *SETTINGS[2:]), 2, shares=True)
    before, *after = sorted({int(line.split()[1]) for line in out.splitlines() if "KEPT" in line})
    assert before == pytest.approx(2 * found.trained * 4 / 2, rel=0.05)  # four models, two read
    assert max(after) - before == pytest.approx(found.update["optimizer"], rel=0.05)
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
    assert not placement.sharding()  # one process
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = load_config("tldr-smoke", "model.lora.rank=4")
    with pytest.raises(ValueError, match="with LoRA take DDP"):
        placement.make_accelerator(config.model)


def test_products_are_bfloat16_and_all_that_is_kept_float32(world):  # noqa: F811
    plain, mixed = make(world), make(world, model__autocast="bfloat16")
    seen = []
    for model in (mixed.actor.policy, mixed.actor.critic, mixed.reference.model):
        model.model.layers[-1].register_forward_hook(lambda *given: seen.append(given[2].dtype))
    rollout = mixed.score(mixed.rollout(0))
    whole = plain._forward(rollout, torch.arange(8))
    rounded = mixed._forward(rollout, torch.arange(8))
    assert rounded[0].dtype == rounded[1].dtype == torch.float32
    for exact, other in zip(whole, rounded, strict=True):
        assert 0 < (exact - other).abs().max() < 0.2  # 8 bits of a logit of 8
    # the learner multiplies as the sampler did
    assert (rounded[0] - rollout.logprobs).abs().max() < 0.2
    mixed.update(rollout, mixed.advantages(rollout))
    assert set(seen) == {torch.bfloat16}
    moments = [s["exp_avg"] for s in mixed.optimizer.state.values()]
    kept = [*mixed.actor.parameters(), *moments]
    assert moments and {x.dtype for x in kept} == {torch.float32}


def test_autocast_is_part_of_what_a_run_is():
    plain, mixed = (load_config("tldr-smoke", *o) for o in ((), ("model.autocast=bfloat16",)))
    assert "marlhf.placement" not in entry_modules("ppo", plain)
    assert "marlhf.placement" in entry_modules("ppo", mixed)
    one, two = (stage_spec("ppo", config) for config in (plain, mixed))
    assert "autocast" not in one.identity["config"]["model"]
    assert two.identity["config"]["model"]["autocast"] == "bfloat16"
    assert one.identity["source"] != two.identity["source"]
