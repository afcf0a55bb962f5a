"""Identity of stages, runs side by side, experiments and their tables."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from marlhf import experiment, pool, stages
from marlhf.config import CONFIGS, ConfigError, load_config, read_yaml
from marlhf.experiment import Experiment, plan
from marlhf.pool import RunFailed, execute
from marlhf.stages import Spec, eval_spec, given_spec, run_stage, stage_spec, with_parents


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MARLHF_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def light(monkeypatch):
    """Stages without their modules: a source hash of names, data without rows."""
    monkeypatch.setattr(stages, "source_hash", lambda modules: "-".join(modules))
    monkeypatch.setattr(stages, "load_data", lambda config: SimpleNamespace(fingerprint="rows"))


def hashes(*overrides, **given):
    config = load_config("tldr-smoke", *overrides)
    ppo = stage_spec("ppo", config, **given)
    return {"ppo": ppo.hash, **{key: parent.hash for key, parent in ppo.parents.items()}}


# Identity


@pytest.mark.parametrize(
    "override, changed",
    [
        ("name=other", ""),
        ("sft.checkpoint_every=1", ""),
        ("rm.checkpoint_every=1", ""),
        ("ppo.checkpoint_every=2", ""),
        ("repeat.samples=3", ""),
        ("data.allow_unsafe_programs=true", ""),
        ("ppo.lam=0.5", "ppo"),
        ("ppo.macro.n=3", "ppo"),
        ("ppo.macro.cutoff=3", ""),  # without a parser nothing reads it
        ("ppo.macro.last_alone=true", "ppo"),
        ("ppo.sampling.rows=8", "ppo"),
        ("ppo.sampling.compile=true", "sft rm ppo"),
        ("eval.every=2", "ppo"),
        ("rm.lr=1e-4", "rm ppo"),
        ("rm.norm_samples=8", "rm ppo"),
        ("sft.lr=1e-4", "sft rm ppo"),
        ("ppo.sampling.temperature=0.7", "sft rm ppo"),
        ("eval.prompts=8", "sft rm ppo"),
        ("model.tiny.layers=1", "sft rm ppo"),
        ("data.size=199", "sft rm ppo"),
        ("seed=1", "sft rm ppo"),
    ],
)
def test_a_setting_changes_the_stages_that_read_it(light, override, changed):
    before, after = hashes(), hashes(override)
    assert {stage for stage in before if before[stage] != after[stage]} == set(changed.split())


def test_chunks_and_a_compiled_step_are_no_settings_where_they_are_off(light):
    ppo = stage_spec("ppo", load_config("tldr-smoke"))
    for spec in (ppo, *ppo.parents.values(), eval_spec(ppo)):
        assert not re.search("rows|compile", json.dumps(spec.identity["config"]))
    config = load_config("tldr-smoke", "ppo.sampling.compile=true")
    assert eval_spec(stage_spec("ppo", config)).identity["config"]["compile"] is True
    assert ppo.identity["config"]["ppo"]["sampling"] == {"temperature": 0.8, "top_k": None}


@pytest.mark.parametrize(
    "name, value",
    [
        ("versions", lambda: {"torch": "99"}),
        ("source_hash", lambda modules: "changed"),
        ("load_data", lambda config: SimpleNamespace(fingerprint="other rows")),
    ],
)
def test_versions_source_and_rows_change_all_stages(light, monkeypatch, name, value):
    before = hashes()
    monkeypatch.setattr(stages, name, value)
    after = hashes()
    assert all(before[stage] != after[stage] for stage in before)


def test_ppo_needs_a_reward_model_only_where_it_reads_one(light):
    assert set(hashes()) == {"sft", "rm", "ppo"}
    assert set(hashes("ppo.reward=task", "ppo.critic_init=policy")) == {"sft", "ppo"}


def test_a_run_is_named_by_what_it_is(light):
    config = load_config("tldr-smoke", "seed=3", "ppo.macro.n=10")
    assert stage_spec("ppo", config).name == "tldr-smoke-macro10-c3"
    assert stage_spec("ppo", config, arm="mine").name == "tldr-smoke-mine-c3"
    assert stage_spec("sft", config).name == "tldr-smoke-c3"
    with pytest.raises(ConfigError, match="unknown stage 'pppo'"):
        stage_spec("pppo", config)


def model_folder(path, content="{}"):
    path.mkdir(parents=True)
    (path / "config.json").write_text(content)
    return str(path)


def test_a_model_folder_is_known_by_its_content(light, tmp_path):
    one, two = (model_folder(tmp_path / name) for name in ("one", "two"))
    other = model_folder(tmp_path / "other", '{"x": 1}')
    assert hashes(f"model.name={one}") == hashes(f"model.name={two}")
    assert hashes(f"model.name={one}")["sft"] != hashes(f"model.name={other}")["sft"]
    (tmp_path / "one" / "model.safetensors").write_bytes(b"weights")
    assert hashes(f"model.name={one}")["sft"] != hashes(f"model.name={two}")["sft"]


def test_a_folder_without_a_model_is_refused(light, tmp_path):
    with pytest.raises(ValueError, match="no model in this folder"):
        hashes(f"model.name={tmp_path}")


def test_rows_of_a_file_are_known_by_content_not_by_place(light, tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{}")
    paths = [f"data.source={tmp_path / name}" for name in ("a.jsonl", "b.jsonl")]
    assert hashes(paths[0]) == hashes(paths[1]) != hashes()


def test_data_is_read_again_when_its_file_changes(tmp_path, monkeypatch):
    reads = []
    task = SimpleNamespace(load=lambda data: reads.append(data.source))
    monkeypatch.setattr("marlhf.tasks.get_task", lambda name: task)
    path = tmp_path / "rows.jsonl"
    path.write_text("{}")
    config = load_config("pairs-small", f"data.source={path}")
    stages.load_data(config), stages.load_data(config)
    assert len(reads) == 1
    path.write_text("{} ")
    stages.load_data(config)
    assert len(reads) == 2


def test_a_given_model_takes_a_stages_place(light, root, tmp_path):
    folder = model_folder(tmp_path / "ready")
    assert hashes(sft=folder, rm=folder)["ppo"] != hashes()["ppo"]
    assert (
        hashes("sft.lr=1e-4", "rm.lr=1e-4", sft=folder, rm=folder)["ppo"]
        == (hashes(sft=folder, rm=folder)["ppo"])
    )
    run = run_stage(given_spec("rm", folder, load_config("tldr-smoke")))
    assert (run.path / "model" / "config.json").read_text() == "{}"


def test_a_given_run_is_taken_by_its_model(light, root, tmp_path):
    folder = tmp_path / "run"
    model = model_folder(folder / "model")
    (folder / "manifest.json").write_text("{}")
    config = load_config("tldr-smoke")
    assert given_spec("rm", str(folder), config).hash == given_spec("rm", model, config).hash
    run = run_stage(given_spec("rm", str(folder), config))
    assert (run.path / "model" / "config.json").is_file()


def test_a_hub_name_that_does_not_answer(light, root, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: 1 / 0)
    spec = given_spec("sft", "nobody/nothing", load_config("tldr-smoke"))
    with pytest.raises(ValueError, match="no folder and no hub model 'nobody/nothing'"):
        run_stage(spec)


# Runs side by side


class Toy(Spec):
    """Adds its number to its parents'; told to, it fails, waits, or is killed."""

    def train(self, run):
        kind = self.identity["config"].get("kind")
        if kind == "fail":
            raise ValueError("the toy broke")
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "wait":
            (run.path / "started").write_text(str(os.getpid()))
            time.sleep(60)
        total = sum(p.run.manifest["summary"]["total"] for p in self.parents.values())
        run.progress(1, 1)
        environment = {key: os.environ.get(key) for key in pool.WORKER_ENVIRONMENT}
        run.finish({"total": total + self.identity["seed"], "pid": os.getpid(), **environment})


def toy(number, *parents, kind=None):
    identity = {"stage": "toy", "config": {"kind": kind}, "seed": number}
    identity["parents"] = {str(i): parent.hash for i, parent in enumerate(parents)}
    config = load_config("tldr-smoke")
    by_name = {str(i): parent for i, parent in enumerate(parents)}
    return Toy("toy", f"t{number}", config, identity, by_name, given="nothing to compute")


def test_each_spec_once_and_after_its_parents():
    base = toy(1)
    left, right = toy(2, base), toy(3, toy(1))
    order = with_parents([toy(4, left, right), left])
    assert [spec.identity["seed"] for spec in order] == [1, 2, 3, 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_execute_runs_all_and_finds_them_again(root, workers, capsys):
    base = toy(1)
    leaves = [toy(10, base), toy(20, base), toy(10, base)]
    runs = execute(leaves, workers=workers)
    assert [run.manifest["summary"]["total"] for run in runs] == [11, 21, 11]
    assert "3 runs to do, 0 done already" in capsys.readouterr().err
    pids = {run.manifest["summary"]["pid"] for run in runs}
    assert (os.getpid() in pids) == (workers == 0)
    if workers:
        assert runs[0].manifest["summary"]["OMP_NUM_THREADS"] == "1"
    stamps = [(run.path / "manifest.json").stat().st_mtime_ns for run in runs]
    again = execute(leaves, workers=workers)
    assert [(run.path / "manifest.json").stat().st_mtime_ns for run in again] == stamps
    assert capsys.readouterr().err == ""


def test_a_run_killed_while_it_tidied_up_is_tidied_not_computed_again(root):
    (run,) = execute([toy(1)], workers=0)
    before = run.manifest
    (run.path / "checkpoints").mkdir()
    (again,) = execute([toy(2, toy(1))], workers=0)  # as a parent
    assert again.manifest["summary"]["total"] == 3
    assert not (run.path / "checkpoints").exists()
    assert run.manifest == before


def test_a_failing_run_stops_its_descendants_alone(root, capsys):
    bad, good = toy(1, kind="fail"), toy(2)
    below, beside = toy(3, bad, good), toy(4, good)
    with pytest.raises(RunFailed) as error:
        execute([below, beside], workers=2)
    message = str(error.value)
    assert "toy/t1 failed: ValueError: the toy broke" in message
    assert str(bad.folder) in message
    assert "1 that need it were not started" in message
    assert beside.finished
    assert not below.finished
    assert "the toy broke" in (bad.folder / "error.txt").read_text()


def test_in_this_process_the_error_itself_is_raised(root):
    with pytest.raises(ValueError, match="the toy broke") as error:
        execute([toy(1, kind="fail")], workers=0, progress=False)
    assert "toy/t1" in error.value.__notes__[0]
    execute([toy(2)], workers=0, progress=False)


def test_a_killed_worker_is_an_error_that_names_its_run(root):
    with pytest.raises(RunFailed, match=r"a worker was killed .* toy/t1"):
        execute([toy(1, kind="die")], workers=1, progress=False)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_experiment import execute, toy
if __name__ == "__main__":
    execute([toy(1, kind="wait"), toy(2, kind="wait")], workers=2, progress=False)
"""


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(root, tmp_path, how):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent))))
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stderr=subprocess.DEVNULL,
        # a shell's background jobs, these tests perhaps among them, ignore Ctrl-C and pass it on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    started = [toy(n, kind="wait").folder / "started" for n in (1, 2)]
    deadline = time.monotonic() + 30
    while not all(p.is_file() and p.read_text() for p in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(p.read_text()) for p in started]
    parent.send_signal(how)
    parent.wait(timeout=10)
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))
    assert not toy(1, kind="wait").finished


def test_workers_share_out_the_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert pool._devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert pool._devices() == ["4", "7"]
    assert pool.workers_available() == 2


# Experiments


SCALES = [
    (name, scale)
    for name in experiment.experiments()
    for scale in read_yaml(CONFIGS / "experiments" / f"{name}.yaml")["chains"]
]


@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_every_experiment_loads_at_every_scale(name, scale):
    found = Experiment.load(name, scale)
    assert found.endpoints["primary"]
    assert len(found.configs) == len(found.arms) * len(found.seeds)


def test_arms_differ_by_what_the_file_says_alone():
    found = Experiment.load("fig02_tldr", "tiny", ["ppo.updates=5"])
    token, macro = (found.configs[arm, 2] for arm in ("token", "macro5"))
    assert (token.ppo.macro.termination, macro.ppo.macro.termination) == ("token", "fixed")
    assert token.ppo.updates == macro.ppo.updates == 5
    assert token.seed == macro.seed == 2
    token.ppo.macro = macro.ppo.macro
    assert token == macro
    assert found.configs["token_matched", 0].ppo.lam == pytest.approx(0.95 ** (1 / 5), abs=1e-4)


def test_arms_share_their_chains_sft_and_reward_model(light):
    found = Experiment.load("fig02_tldr", "tiny")
    specs = found.specs()
    assert [sum(s.stage == stage for s in specs) for stage in stages.STAGES] == [6, 6, 30]
    evals = 6 * (5 + 1)  # repeated samples of each arm and of the SFT model
    assert len({spec.folder for spec in specs}) == len(specs) == 42 + evals


def test_pilots_have_seeds_of_their_own(light):
    pilot = Experiment.load("fig02_tldr", "tiny", seeds=[100])
    reported = {spec.hash for spec in Experiment.load("fig02_tldr", "tiny").specs()}
    assert not reported & {spec.hash for spec in pilot.specs()}


@pytest.mark.parametrize(
    "text, words",
    [
        ("arms: {a: {ppo: {lamb: 1}}}", "mine.yaml, arm a: unknown key 'ppo.lamb'"),
        ("arm: {a: {}}", "unknown key 'arm'. Did you mean arms"),
        ("arms: {a: {}}\nscales: {smok: {}}", "scales: no 'smok'. Did you mean smoke"),
        ("", "arms is missing"),
        ("arms: {a: {}}\ncomparisons: [[a, b]]", "comparisons: no arm 'b'"),
    ],
)
def test_a_bad_experiment_names_file_and_key(tmp_path, monkeypatch, text, words):
    (tmp_path / "experiments").mkdir()
    path = tmp_path / "experiments" / "mine.yaml"
    path.write_text(f"task: tldr\nchains: {{smoke: 1}}\n{text}\n")
    monkeypatch.setattr(experiment, "CONFIGS", tmp_path)
    with pytest.raises(ConfigError) as error:
        Experiment.load("mine", "smoke")
    assert words in str(error.value)


def test_unknown_experiment_or_scale():
    with pytest.raises(ConfigError, match="unknown experiment 'fig2'"):
        Experiment.load("fig2")
    with pytest.raises(ConfigError, match=r"no scale 'small'\. There are: smoke, tiny, full"):
        Experiment.load("fig02_tldr", "small")


REPEATED = """
task: tldr
chains: {smoke: 2}
repeat: {samples: 3}
arms: {a: {ppo: {lam: 0.9}}, b: {ppo: {lam: 0.8}}}
"""


@pytest.fixture
def repeated(tmp_path, monkeypatch):
    """An experiment that asks for repeated samples."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text(REPEATED)
    monkeypatch.setattr(experiment, "CONFIGS", tmp_path)
    return Experiment.load("mine", "smoke")


def test_repeated_samples_are_of_every_arm_and_of_each_sft_model_once(light, repeated):
    specs = repeated.specs()
    assert [sum(s.stage == stage for s in specs) for stage in ("ppo", "eval")] == [4, 6]
    assert set(repeated.eval_specs()) == {(a, c) for a in ("sft", "a", "b") for c in (0, 1)}
    found = repeated.eval_specs()["a", 1]
    assert found.parents["policy"].hash == repeated.arm_specs()["a", 1].hash
    assert set(found.parents) == {"policy", "sft", "rm"}
    assert found.config.repeat.samples == 3


def test_arms_of_another_sft_model_have_its_samples_beside_them(light):
    found = Experiment.load("fig09_scaling", "tiny")
    evals, specs = found.eval_specs(), found.arm_specs()
    keys = {arm for arm, _ in evals}
    assert keys == {*found.arms, "sft", "sft_token", "sft_token_large"}
    owners = {"sft": "macro5_small", "sft_token": "macro5", "sft_token_large": "macro5_large"}
    for key, arm in owners.items():
        for chain in found.seeds:
            sampled = evals[key, chain].parents["policy"]
            assert sampled.hash == specs[arm, chain].parents["sft"].hash
    labels = found.labels()
    assert labels["sft"] == "SFT"
    assert labels["sft_token_large"] == "SFT of token PPO, 405k parameters"
    assert keys <= set(labels)


def test_a_scale_has_settings_of_its_own():
    found = {scale: Experiment.load("fig08_best_of_n", scale) for scale in ("smoke", "tiny")}
    repeats = {key: {c.repeat.prompts for c in e.configs.values()} for key, e in found.items()}
    assert repeats == {"smoke": {8}, "tiny": {128}}
    small = Experiment.load("fig08_best_of_n", "smoke", ["repeat.prompts=4"])
    assert {c.repeat.prompts for c in small.configs.values()} == {4}


@pytest.mark.parametrize(
    "override, changes",
    [
        ("repeat.samples=4", True),
        ("repeat.temperatures=[0.3]", True),
        ("repeat.temperatures=[0.8]", False),  # that of training, said out loud
        ("ppo.lr=1e-5", True),  # another policy
        ("eval.every=2", True),
        ("data.allow_unsafe_programs=true", False),
    ],
)
def test_what_repeated_samples_depend_on(light, override, changes):
    before, after = (
        eval_spec(stage_spec("ppo", load_config("tldr-smoke", *given)))
        for given in ((), (override,))
    )
    assert (before.hash != after.hash) == changes


@pytest.fixture
def fake_training(monkeypatch):
    def train(spec, run):
        run.resume()
        if spec.stage == "eval":
            run.log("repeated", {"prompt_id": "p", "sample": 0})
            means = dict.fromkeys(experiment.QUALITY, 0.5) | {"true_score": None}
            run.finish({"temperatures": {"0.8": means, "1": means | {"kl": 2.0}}})
            return
        if spec.stage == "ppo":
            for table in experiment.TABLES:
                run.log(table, {"update": 0, "rm_score": spec.config.ppo.lam})
        run.finish({"after": {"rm_score": 1.0}})

    monkeypatch.setattr(Spec, "train", train)


def test_frames_say_arm_label_and_chain(light, fake_training, root):
    found = Experiment.load("fig02_tldr", "smoke")
    with pytest.raises(ValueError, match="has not been run"):
        found.frames()
    execute(found.specs(), workers=0, progress=False)
    frames = found.frames()
    assert list(frames) == ["evals", "metrics", "samples", "repeated", "quality", "runs"]
    evals = frames["evals"]
    assert list(evals) == ["arm", "label", "chain", "update", "rm_score"]
    assert len(evals) == 10
    assert evals[(evals.arm == "token_matched")].rm_score.tolist() == [0.9898, 0.9898]
    runs = frames["runs"]
    assert runs.stage.value_counts().to_dict() == {"sft": 2, "rm": 2, "ppo": 10, "eval": 12}
    assert runs.loc[runs.stage != "eval", "summary.after.rm_score"].eq(1).all()
    assert json.loads(runs.config[0])["name"] == "tldr-smoke"
    assert set(runs.arm) == {"", "sft", *found.arms}


def test_frames_have_the_repeated_samples(light, repeated, fake_training, root):
    execute(repeated.specs(), workers=0, progress=False)
    frames = repeated.frames()
    assert list(frames) == ["evals", "metrics", "samples", "repeated", "quality", "runs"]
    assert frames["repeated"].groupby(["arm", "label"], sort=False).size().to_dict() == {
        ("sft", "SFT"): 2,
        ("a", "a"): 2,
        ("b", "b"): 2,
    }
    quality = frames["quality"]
    assert list(quality) == ["arm", "label", "chain", "temperature", *experiment.QUALITY]
    assert len(quality) == 3 * 2 * 2
    assert quality.groupby("temperature")["kl"].unique().to_dict() == {0.8: [0.5], 1.0: [2.0]}
    assert quality["true_score"].isna().all() and quality["true_score"].dtype == float
    assert frames["runs"].stage.value_counts()["eval"] == 6


def test_plan_counts_runs_minutes_and_what_is_done(light, fake_training, root, monkeypatch):
    minutes = {"sft": 2.0, "rm": 3.0, "ppo": 1.0, "ppo/whole": 4.0, "eval": 0.5}
    monkeypatch.setattr(pool, "ledger", lambda: {"minutes": {"tldr-tiny": minutes}})
    table = plan("tiny", ["fig02_tldr"]).set_index(["stage", "arm"])
    assert table.runs.sum() == 42 + 36
    assert table.done.sum() == 0
    assert table.minutes[("sft", "")] == 12
    assert table.minutes[("ppo", "whole")] == 24
    assert table.left.sum() == table.minutes.sum()
    repeated = 36 * 0.5 * 256 / 1000  # a sample of 256 prompts; the figure is of 1000 responses
    assert table.minutes.sum() == pytest.approx(12 + 18 + 24 + 4 * 6 + repeated)
    execute(Experiment.load("fig02_tldr", "tiny", seeds=[0]).specs(), 0, progress=False)
    after = plan("tiny", ["fig02_tldr"]).set_index(["stage", "arm"])
    assert after.done.sum() == 7 + 6
    assert after.left[("sft", "")] == 10
    assert after.minutes[("sft", "")] == pytest.approx(10, abs=0.1)


def test_minutes_of_other_widths_and_of_repeated_samples(light, monkeypatch):
    known = {"sft": 1.0, "sft/hidden32": 0.5, "ppo": 1.0, "ppo/b": 2.0, "eval": 0.1}
    monkeypatch.setattr(pool, "ledger", lambda: {"minutes": {"tldr-smoke": known}})
    repeat = {"repeat": {"samples": 3, "temperatures": [0.0, 0.8], "prompts": 10}}
    small = load_config("tldr-smoke", "model.tiny.hidden=32", "model.tiny.ff=64", repeat)
    assert pool.minutes(stage_spec("sft", load_config("tldr-smoke"))) == 1.0
    assert pool.minutes(stage_spec("sft", small)) == 0.5
    ppo = stage_spec("ppo", small, arm="b")
    assert pool.minutes(ppo) == 2.0
    assert pool.minutes(eval_spec(ppo)) == pytest.approx(0.1 * (1 + 3) * 10 / 1000)
    assert pool.minutes(stage_spec("rm", small)) is None


def test_plan_says_where_minutes_are_not_known(light, root, monkeypatch):
    monkeypatch.setattr(pool, "ledger", lambda: {"minutes": {}})
    assert plan("tiny", ["fig02_tldr"]).minutes.isna().all()
    with pytest.raises(ConfigError, match="no experiment has the scale 'huge'"):
        plan("huge")


def test_children_are_never_forked():
    # A fork of a process that holds torch's or CUDA's threads hangs; spawn works in Jupyter too.
    with pool._pool(1, []) as executor:
        assert executor._mp_context is multiprocessing.get_context("spawn")
