"""SFT and reward model: losses, the order of the rows, kills at any moment, and what is kept."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from marlhf import supervised
from marlhf.config import load_config, to_dict
from marlhf.models import load_policy, load_scalar, save_model, sequence_scores
from marlhf.rewards import RewardModel
from marlhf.roles import on_trunk
from marlhf.runs import Run
from marlhf.supervised import (
    Comparisons,
    Demonstrations,
    collate_comparisons,
    collate_demonstrations,
    comparison,
    demonstration,
    mean_loss,
    train_rm,
    train_sft,
)
from marlhf.tasks import get_task
from marlhf.text import DataError, train_tokenizer
from marlhf.trainer import StageTrainer, TrainingError, data_order, training_arguments

SMALL = {
    "data.size": 120,
    "data.valid": 10,
    "data.response_tokens": 40,
    "model.tiny.hidden": 32,
    "model.tiny.ff": 32,
    "model.tiny.vocab": 400,
    "eval.prompts": 10,
    "sft.steps": 5,
    "sft.checkpoint_every": 2,
    "rm.steps": 5,
    "rm.checkpoint_every": 2,
    "rm.norm_samples": 8,
}


def settings(**overrides):
    options = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config("tldr-smoke", SMALL, options)


def open_run(stage, root, config):
    identity = {"stage": stage, "config": to_dict(config), "seed": config.seed}
    return Run.open(stage, "test", identity, root)


@pytest.fixture(scope="module")
def data():
    return get_task("tldr").load(settings().data)


@pytest.fixture(scope="module")
def sft(data, tmp_path_factory):
    """A finished SFT run."""
    config = settings()
    run = open_run("sft", tmp_path_factory.mktemp("runs"), config)
    train_sft(config, data, run)
    return run


@pytest.fixture(scope="module")
def tokenizer(data):
    return train_tokenizer((e.prompt.text + e.response for e in data.sft), 400)


def encode_sft(data, tokenizer, config, count=6):
    return [demonstration(e, tokenizer, config) for e in data.sft[:count]]


def encode_rm(data, tokenizer, config, count=6):
    return [comparison(p, RewardModel(None, tokenizer, 96, 40)) for p in data.rm[:count]]


# Losses


@pytest.mark.parametrize("arch", ["llama", "gemma"])
def test_sft_loss_is_transformers_own(arch, data, tokenizer):
    config = settings(model__tiny__arch=arch)
    model = load_policy(config.model, tokenizer)
    rows = encode_sft(data, tokenizer, config)
    batch = collate_demonstrations(rows, tokenizer.pad_token_id)
    labels, mask = torch.full_like(batch["ids"], -100), torch.zeros_like(batch["ids"])
    for i, row in enumerate(rows):
        labels[i, len(row.first) : row.length] = torch.tensor(row.second)
        mask[i, : row.length] = 1
    own = model(batch["ids"], attention_mask=mask, labels=labels).loss
    assert batch.pop("rows") == [row.id for row in rows]
    torch.testing.assert_close(Demonstrations(model)(**batch)["loss"], own)
    terms = int((batch["labels"] != -100).sum())
    assert terms == sum(len(row.second) for row in rows)
    # a micro-batch's share of a batch of twice as many tokens
    share = Demonstrations(model)(**batch, num_items_in_batch=2 * terms)["loss"]
    torch.testing.assert_close(share, own / 2)


def test_demonstrations_end_unless_they_were_cut(data, tokenizer):
    rows = encode_sft(data, tokenizer, settings(data__response_tokens=60), 40)
    ended = [row.second[-1] == tokenizer.eos_token_id for row in rows]
    assert {len(row.second) for row, end in zip(rows, ended, strict=True) if not end} == {60}
    assert any(ended)
    assert all(row.length == len(row.first) + len(row.second) for row in rows)


def test_rm_loss_by_hand(data, tokenizer, tmp_path):
    config = settings()
    save_model(load_policy(config.model, tokenizer), tokenizer, tmp_path)
    model = load_scalar(config.model, tokenizer, tmp_path).eval()
    rows = encode_rm(data, tokenizer, config)

    def score(ids):  # transformers' own reading, one text at a time
        return model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0, 0]

    margins = torch.stack([score(row.first) - score(row.second) for row in rows])
    want = (1 + torch.exp(-margins)).log().mean()
    batch = collate_comparisons(rows, tokenizer.pad_token_id)
    del batch["rows"]
    torch.testing.assert_close(Comparisons(model)(**batch)["loss"], want)


def test_a_comparisons_end_token_says_whether_it_was_finished(data, tokenizer):
    scorer = RewardModel(None, tokenizer, 96, 72)
    pair = replace(data.rm[0], chosen=" a b", rejected=" c", rejected_finished=False)
    row = comparison(pair, scorer)
    assert row.first[-1] == tokenizer.eos_token_id
    assert row.second[-1] != tokenizer.eos_token_id
    assert row.length == max(len(row.first), len(row.second))


def test_mean_loss_is_over_all_terms_whatever_the_batches(data, tokenizer):
    config = settings()
    objective = Demonstrations(load_policy(config.model, tokenizer))
    rows = encode_sft(data, tokenizer, config, 7)

    def collate(rows):
        return collate_demonstrations(rows, tokenizer.pad_token_id)

    whole = collate(rows)
    del whole["rows"]
    want = objective(**whole)["loss"].item()
    for batch in (1, 3, 7):
        assert mean_loss(objective, rows, collate, batch) == pytest.approx(want, rel=1e-5)
    assert mean_loss(objective, [], collate, 2) is None


# The order of the rows


@pytest.mark.parametrize(
    ("rows", "batch", "steps"), [(40, 4, 20), (10, 4, 15), (3, 4, 2), (64, 8, 8)]
)
def test_order_is_pass_after_pass(rows, batch, steps):
    order = data_order(np.arange(rows) % 7, batch, steps, 0, "sft")
    assert len(order) == batch * steps
    counts = np.bincount(order, minlength=rows)
    assert counts.max() - counts.min() <= 1
    assert (order == data_order(np.arange(rows) % 7, batch, steps, 0, "sft")).all()
    assert (order != data_order(np.arange(rows) % 7, batch, steps, 1, "sft")).any()


def test_batches_are_of_rows_alike_in_length_in_any_order():
    lengths = np.random.default_rng(0).integers(50, 150, 800)
    batches = lengths[data_order(lengths, 10, 80, 3, "rm")].reshape(80, 10)
    assert np.ptp(batches, axis=1).mean() < 25
    means = batches.mean(1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.35  # short ones are not together


def test_a_batch_that_does_not_divide_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="8 rows is not a multiple of 3 processes"):
        training_arguments(settings().sft, 5, 0, tmp_path)


# Training


class Untouched:
    """In a run's place, where only the weights matter."""

    seconds = 0.0

    def __init__(self, path):
        self.path, self.rows, self.saved = path, [], []

    def resume(self):
        return None

    def log(self, table, row):
        self.rows.append(row)

    def progress(self, done, total):
        pass

    def save_checkpoint(self, step, write):
        self.saved.append(step)


def train(stage, config, data, tokenizer, folder):
    pad = tokenizer.pad_token_id
    if stage == "sft":
        rows, collate = encode_sft(data, tokenizer, config, 18), collate_demonstrations
        objective = Demonstrations(load_policy(config.model, tokenizer))
    else:
        rows, collate = encode_rm(data, tokenizer, config, 18), collate_comparisons
        save_model(load_policy(config.model, tokenizer), tokenizer, folder)
        objective = Comparisons(load_scalar(config.model, tokenizer, folder))
    run = Untouched(folder)
    trainer = StageTrainer(stage, objective, rows, lambda r: collate(r, pad), config, run)
    trainer.go()
    return objective, run


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_micro_batches_train_as_the_whole_batch(stage, data, tokenizer, tmp_path):
    """The mean is over the terms of the whole batch: rows are of unequal length. To 1e-3 of a
    learning rate of 5e-3 (2e-3) after five steps of AdamW, which divides by small gradients."""
    whole, run = train(stage, settings(), data, tokenizer, tmp_path)
    parts, again = train(stage, settings(**{f"{stage}__micro_batch": 2}), data, tokenizer, tmp_path)
    for a, b in zip(run.rows, again.rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_trainer_is_a_plain_loop_of_adamw(stage, data, tokenizer, tmp_path):
    """Warm-up then cosine, clipping, decay, every row where the order says."""
    config = settings(**{f"{stage}__weight_decay": 0.1})
    trained, run = train(stage, config, data, tokenizer, tmp_path)
    options = getattr(config, stage)
    rows = (encode_sft if stage == "sft" else encode_rm)(data, tokenizer, config, 18)
    collate = collate_demonstrations if stage == "sft" else collate_comparisons
    if stage == "sft":
        objective = Demonstrations(load_policy(config.model, tokenizer))
    else:
        objective = Comparisons(load_scalar(config.model, tokenizer, tmp_path))
    decay = [p for p in objective.parameters() if p.ndim > 1]
    rest = [p for p in objective.parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr)
    scheduler = transformers.get_scheduler("cosine", optimizer, 1, 5)
    order = data_order([row.length for row in rows], 8, 5, 0, stage).reshape(5, 8)
    for step, index in enumerate(order):
        batch = collate([rows[i] for i in index], tokenizer.pad_token_id)
        del batch["rows"]
        loss = objective(**batch)["loss"]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        row = run.rows[step]
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert row["lr"] == pytest.approx(scheduler.get_last_lr()[0])
        assert row["step"] == step + 1
        assert row["epoch"] == pytest.approx((step + 1) * 8 / 18)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    for a, b in zip(trained.parameters(), objective.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)
    assert run.saved == [2, 4, 5]


def test_sft_leaves_what_its_summary_says(sft, data):
    summary, samples, metrics = sft.manifest["summary"], sft.frame("samples"), sft.frame("metrics")
    assert summary["loss_after"] < summary["loss_before"]
    assert summary["rows"] == len(data.sft)
    assert summary["steps"] == len(metrics) == 5
    assert summary["best_score"] == 7
    assert samples.prompt_id.tolist() == [e.id for e in data.valid]
    assert samples.true_score.mean() == pytest.approx(summary["true_score"])
    assert samples.finished.mean() == pytest.approx(summary["share_finished"])
    assert samples.length.mean() == pytest.approx(summary["response_tokens"])
    model = transformers.AutoModelForCausalLM.from_pretrained(sft.path / "model")
    words = transformers.AutoTokenizer.from_pretrained(sft.path / "model")
    assert len(words) == model.config.vocab_size == 400


def test_rm_leaves_what_its_summary_says(sft, data, tmp_path):
    config = settings(rm__steps=2)
    run = open_run("rm", tmp_path, config)
    train_rm(config, data, run, sft.path)
    summary, samples = run.manifest["summary"], run.frame("samples")
    assert summary["valid_pairs"] == len(data.valid_pairs)
    assert 0 <= summary["accuracy_low"] <= summary["accuracy_after"] <= summary["accuracy_high"]
    assert json.loads((run.path / "model/reward.json").read_text()) == {
        "mean": summary["score_mean"],
        "std": summary["score_std"],
    }
    want = samples.rm_score.corr(samples.true_score)
    assert summary["truth_correlation"] == pytest.approx(want, abs=1e-6)
    reward = RewardModel.load(run.path / "model", config)
    columns = {"finished": samples.finished.tolist()}
    scores = reward(data.valid, samples.response.tolist(), columns)
    np.testing.assert_allclose(scores, samples.rm_score, atol=1e-4)
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(run.path / "model")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.isfinite(sequence_scores(model, ids, torch.tensor([3]))).all()
    # the samples are the SFT run's own: same prompts, same random numbers
    assert samples.response.tolist() == sft.frame("samples").response.tolist()


def test_rm_learns_a_rule(sft, data, tmp_path):
    """Preferred: the longer text. Accuracy on held-out pairs goes to nearly one."""

    def ruled(pairs):
        return [replace(p, chosen=p.chosen + p.rejected, rejected=" no") for p in pairs]

    rows = replace(data, rm=ruled(data.rm), valid_pairs=ruled(data.valid_pairs))
    config = settings(rm__steps=10)
    run = open_run("rm", tmp_path, config)
    train_rm(config, rows, run, sft.path)
    assert run.manifest["summary"]["accuracy_after"] >= 0.9


def test_without_comparisons_to_hold_out_and_without_truth(sft, data, tmp_path, monkeypatch):
    monkeypatch.setattr(type(get_task("tldr")), "has_truth", lambda self, data: False)
    config = settings(rm__steps=1)
    run = open_run("rm", tmp_path, config)
    train_rm(config, replace(data, valid_pairs=[], ppo=[]), run, sft.path)
    summary = run.manifest["summary"]
    assert summary["accuracy_after"] is None
    assert summary["truth_correlation"] is None
    assert run.frame("samples").true_score.isna().all()


@pytest.mark.parametrize(("part", "stage"), [("sft", train_sft), ("rm", train_rm)])
def test_no_rows_is_one_error(part, stage, data, sft, tmp_path):
    config = settings()
    run = open_run(part, tmp_path, config)
    rest = (sft.path,) if part == "rm" else ()
    with run, pytest.raises(DataError, match="needs (demonstrations|comparisons)"):
        stage(config, replace(data, **{part: []}), run, *rest)


def test_a_model_of_ones_own_and_lora(sft, data, tmp_path):
    """Weights and tokenizer from a folder; only adapters are trained; what is saved is merged."""
    overrides = {"model__name": str(sft.path / "model"), "model__lora__rank": 2}
    config = settings(**overrides, sft__steps=3, rm__steps=3)
    one = open_run("sft", tmp_path, config)
    train_sft(config, data, one)
    two = open_run("rm", tmp_path, config)
    train_rm(config, data, two, one.path)
    for run, auto in (
        (one, transformers.AutoModelForCausalLM),
        (two, transformers.AutoModelForSequenceClassification),
    ):
        assert not list((run.path / "model").glob("adapter_*"))
        model = auto.from_pretrained(run.path / "model")
        base = transformers.AutoModel.from_pretrained(sft.path / "model")
        moved = {
            name.split(".")[-2]
            for name, weight in model.base_model.named_parameters()
            if not torch.equal(weight, base.get_parameter(name))
        }
        assert {"q_proj", "down_proj"} <= moved
        assert not {"embed_tokens", "norm"} & moved
    assert on_trunk(two.path / "model", one.path / "model")  # its adapter is kept beside


# Kills and faults


class Killed(BaseException):
    pass


def everything(run):
    """Weights, tables and summary of a finished run, timings excepted."""
    tables = {name: run.frame(name) for name in run.tables}
    tables["metrics"] = tables["metrics"].drop(columns="seconds")
    files = {path.name: path.read_bytes() for path in (run.path / "model").iterdir()}
    return {name: t.to_json() for name, t in tables.items()}, files, run.manifest["summary"]


def kill_in_step(monkeypatch, count):
    real, calls = StageTrainer.training_step, []

    def dying(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            raise Killed
        return real(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", dying)


def kill_in_checkpoint(monkeypatch, count):
    real, calls = StageTrainer._save_scaler, []

    def dying(self, folder):  # weights and optimizer are written, the rest is not
        calls.append(1)
        if len(calls) == count:
            raise Killed
        return real(self, folder)

    monkeypatch.setattr(StageTrainer, "_save_scaler", dying)


def kill_in_samples(monkeypatch, count):
    real, calls = Run.log, []

    def dying(self, table, row):
        calls.append(table)
        real(self, table, row)
        if calls.count("samples") == count:
            raise Killed

    monkeypatch.setattr(Run, "log", dying)


KILLS = [
    (kill_in_step, 1), (kill_in_step, 4), (kill_in_step, 10),
    (kill_in_checkpoint, 1), (kill_in_checkpoint, 2), (kill_in_checkpoint, 3),
    (kill_in_samples, 4),
]  # fmt: skip


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_a_killed_run_ends_bit_for_bit_as_if_it_had_not_been(stage, data, sft, tmp_path):
    config = settings(**{f"{stage}__micro_batch": 4})

    def go(run):
        train_sft(config, data, run) if stage == "sft" else train_rm(config, data, run, sft.path)

    whole = open_run(stage, tmp_path / "whole", config)
    go(whole)
    want = everything(whole)
    for number, (kill, count) in enumerate(KILLS):
        root = tmp_path / str(number)
        with open_run(stage, root, config) as run:
            with pytest.MonkeyPatch.context() as patch:
                kill(patch, count)
                with pytest.raises(Killed):
                    go(run)
            run.log("metrics", {"step": 99, "loss": 0.0})  # a row that no checkpoint knows of
        run = open_run(stage, root, config)
        torch.rand(3)  # whatever the new process did before
        go(run)
        assert everything(run) == want, f"{kill.__name__} {count}"
        assert not (run.path / "checkpoints").exists()


@pytest.mark.parametrize("micro", [None, 4])
def test_a_loss_that_is_not_finite_keeps_the_last_state_and_names_the_batch(
    micro, data, tmp_path, monkeypatch
):
    config = settings(sft__micro_batch=micro)
    bad = data.sft[3].id
    with open_run("sft", tmp_path, config) as run:
        real, collate = Demonstrations.losses, supervised.collate_demonstrations
        poison = []  # the tokens of the bad row; Trainer collates micro-batches ahead of their use

        def poisoned(self, ids, starts, labels):
            losses = real(self, ids, starts, labels)
            hit = any(row[: len(bad)] == bad for bad in poison for row in ids.tolist())
            return losses * torch.nan if hit else losses

        def watched(rows, pad):
            poison.extend(row.first + row.second for row in rows if row.id == bad)
            return collate(rows, pad)

        monkeypatch.setattr(Demonstrations, "losses", poisoned)
        monkeypatch.setattr(supervised, "collate_demonstrations", watched)
        config.eval.prompts, config.sft.steps = 1, 40
        with pytest.raises(TrainingError, match=r"sft step \d+: the loss is nan on the batch") as e:
            train_sft(config, data, run)
        step = int(str(e.value).split()[2].rstrip(":"))
        assert run.latest_checkpoint()[0] == step - 1
        weights = run.latest_checkpoint()[1] / f"checkpoint-{step - 1}" / "pytorch_model.bin"
        state = torch.load(weights, weights_only=True)
        assert all(torch.isfinite(weight).all() for weight in state.values())
        assert str(run.path) in str(e.value)
        assert "sft.lr" in str(e.value)


def test_a_gradient_that_is_not_finite_stops_the_run(data, tmp_path):
    config = settings(sft__steps=2)
    with open_run("sft", tmp_path, config) as run, pytest.MonkeyPatch.context() as patch:
        real = Demonstrations.losses

        def steep(self, ids, starts, labels):  # 0, with an infinite slope
            losses = real(self, ids, starts, labels)
            return losses + (losses - losses.detach()).abs().sqrt()

        patch.setattr(Demonstrations, "losses", steep)
        with pytest.raises(TrainingError, match="sft step 1: the gradient norm is nan"):
            train_sft(config, data, run)
        assert run.latest_checkpoint()[0] == 0
