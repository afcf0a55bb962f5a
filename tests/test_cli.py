"""The command line: help, errors in one line, options that set keys."""

import json
import subprocess
import sys

import pytest

import marlhf
from marlhf import cli, experiment, pool
from marlhf.config import KEYS
from marlhf.runs import Run


def run(capsys, *argv):
    code = cli.main(list(argv))
    streams = capsys.readouterr()
    return code, streams.out, streams.err


@pytest.mark.parametrize("command", ["sft", "rm", "ppo", "eval", "run", "push", "plan", "claims"])
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: marlhf {command}" in text
    assert max(map(len, text.splitlines())) <= 100


def test_help_of_ppo_lists_every_key_with_its_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["ppo", "--help"])
    text = capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    repeat = capsys.readouterr().out  # of experiments alone
    known = {name: repeat if name.startswith("repeat.") else text for name in KEYS if "." in name}
    assert [name for name, listed in known.items() if f"  {name}=" not in listed] == []
    assert "ppo.lam=0.95" in text


def test_overview_says_what_each_command_does(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "MARLHF_RUNS" in text


@pytest.mark.parametrize(
    "argv, words",
    [
        (["ppo", "tldr-tny"], "unknown preset 'tldr-tny'. Did you mean tldr-tiny?"),
        (["ppo", "tldr-tiny", "ppo.lamb=1"], "unknown key 'ppo.lamb'. Did you mean ppo.lam"),
        (["ppo", "tldr-tiny", "ppo.lam=a"], "ppo.lam must be a number"),
        (["ppo", "tldr-tiny", "word"], "'word' is not of the form key=value"),
        (["ppo", "tldr-tiny", "--lam", "1"], "unknown argument --lam"),
        (["ppo", "tldr-tiny", "--seed", "-1"], "seed must be at least 0"),
        (["ppo", "tldr-tiny", "--task", "tldrr"], "unknown task 'tldrr'"),
        (["sft", "tldr-tiny", "--data", "no/such.jsonl"], "no/such.jsonl"),
        (["run", "fig2"], "unknown experiment 'fig2'"),
        (["run", "fig02_tldr", "--scale", "big"], "no scale 'big'"),
        (["plan", "--scale", "big"], "no experiment has the scale 'big'"),
        (["plan", "--what"], "unknown argument --what"),
    ],
)
def test_bad_input_is_one_line_and_code_2(capsys, argv, words):
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("marlhf: ")
    assert words in err


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="unknown preset"):
        cli.main(["ppo", "tldr-tny", "--debug"])


def test_bugs_keep_their_traceback(monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "load_config", fail)
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["ppo", "tldr-tiny"])


def test_a_failed_run_is_one_line_and_code_1(capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise pool.RunFailed("ppo/x failed: because")

    monkeypatch.setattr(experiment, "execute", fail)
    code, _, err = run(capsys, "run", "fig02_tldr", "--scale", "smoke")
    assert (code, err) == (1, "marlhf: ppo/x failed: because\n")


def test_several_experiments_are_one_batch(capsys, monkeypatch):
    batches = []
    monkeypatch.setattr(experiment, "execute", lambda specs, *_, **__: batches.append(specs))
    names = ("fig02_tldr", "fig06_ngram")
    code, out, _ = run(capsys, "run", *names, "ppo.updates=2", "--scale", "smoke")
    assert code == 0
    (specs,) = batches
    assert {s.config.ppo.updates for s in specs} == {2}
    each = [experiment.Experiment.load(name, "smoke", ["ppo.updates=2"]) for name in names]
    assert {s.hash for s in specs} == {s.hash for e in each for s in e.specs()}
    assert "macro10 chain 1" in out
    code, _, err = run(capsys, "run", "ppo.updates=2")
    assert code == 2 and "needs an experiment" in err


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "execute", stop)
    code, _, err = run(capsys, "run", "fig02_tldr", "--scale", "smoke")
    assert code == 130
    assert "goes on from the last checkpoint" in err


def test_options_set_keys_and_may_stand_anywhere(capsys):
    code, out, _ = run(
        capsys, "ppo", "tldr-small", "--data", "a b/rows.jsonl", "--model", "me/model",
        "ppo.updates=7", "--task", "pairs", "--seed", "4", "--show", "ppo.lam=0.5",
    )  # fmt: skip
    assert code == 0
    for line in ("source: a b/rows.jsonl", "name: me/model", "updates: 7", "task: pairs"):
        assert line in out
    assert "seed: 4" in out
    assert "lam: 0.5" in out


@pytest.fixture
def executed(monkeypatch, tmp_path):
    """What `execute` was asked for; the run it gives back is made up."""
    calls = []

    def execute(specs, workers=None, progress=True, threads=1):
        calls.append((specs[0], workers, progress, threads))
        with Run.open("ppo", "made-up", {"config": {}, "seed": 0}, tmp_path) as made:
            for update in (0, 5):
                row = {"update": update, "prompt_id": "p1", "prompt": "Q:", "response": " A"}
                made.log("samples", row | {"rm_score": update})
            made.finish({"after": {"rm_score": 0.5}})
        return [made]

    monkeypatch.setattr("marlhf.pool.execute", execute)
    monkeypatch.setattr("marlhf.stages.stage_spec", lambda *args, **kwargs: (args, kwargs))
    return calls


def test_a_stage_runs_with_what_is_given_and_prints_what_came_out(capsys, executed):
    code, out, _ = run(
        capsys, "ppo", "tldr-smoke", "--sft", "some/model", "--threads", "2", "--quiet"
    )
    assert code == 0
    ((stage, config), given), workers, progress, threads = executed[0]
    assert (stage, config.name, given) == ("ppo", "tldr-smoke", {"sft": "some/model", "rm": None})
    assert (workers, progress, threads) == (0, False, 2)
    assert '"rm_score": 0.5' in out
    assert "[p1] RM score 5.00\nQ:\n-> A" in out


def test_plan_prints_the_total(capsys, monkeypatch):
    import pandas

    table = pandas.DataFrame(
        {
            "experiment": ["fig"] * 2,
            "stage": ["sft", "ppo"],
            "arm": ["", "token"],
            "runs": [2, 4],
            "done": [1, 0],
            "minutes": [6.0, 8.0],
            "left": [3.0, 8.0],
        }
    )
    monkeypatch.setattr(experiment, "plan", lambda scale, names: table)
    monkeypatch.setattr(pool, "workers_available", lambda: 2)
    code, out, _ = run(capsys, "plan")
    assert code == 0
    last = out.strip().splitlines()[-1]
    assert last == (
        "tiny: 6 runs, 1 done; 14 minutes of one process, 11 left, about 6 with 2 side by side"
    )


@pytest.mark.slow
def test_three_lines_of_python_and_eval_agree_with_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MARLHF_RUNS", str(tmp_path))
    short = ["sft.steps=2", "rm.steps=1", "ppo.updates=1", "data.size=80", "rm.norm_samples=4"]
    made = marlhf.run("ppo", marlhf.load_config("tldr-smoke", *short))
    assert made.finished
    capsys.readouterr()
    out = tmp_path / "rows.jsonl"
    assert cli.main(["eval", str(made.path), "tldr-smoke", *short, "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    last = made.frame("evals").iloc[-1]
    for name in ("rm_score", "true_score", "kl", "length", "finished", "distinct2"):
        assert printed[name] == pytest.approx(last[name], abs=1e-4), name
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    samples = made.frame("samples")
    expected = samples[samples["update"] == samples["update"].max()]
    assert [row["response"] for row in rows] == expected["response"].tolist()


def test_the_package_is_light_and_exports_what_three_lines_need():
    code = (
        "import sys, marlhf; assert 'torch' not in sys.modules; "
        "config = marlhf.load_config('tldr-tiny', 'ppo.lam=0.99'); assert config.ppo.lam == 0.99; "
        "marlhf.run; marlhf.Experiment; marlhf.Run; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = marlhf.nothing


def test_python_dash_m_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "marlhf", "ppo", "nothing-here"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("marlhf: unknown preset 'nothing-here'")


def test_claims_are_printed_and_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MARLHF_RESULTS", str(tmp_path))
    code, _, err = run(capsys, "claims", "--scale", "smoke")
    assert code == 2 and "make reproduce SCALE=smoke" in err
    (tmp_path / "smoke").mkdir()
    code, out, _ = run(capsys, "claims", "--scale", "smoke")
    assert code == 0 and "12  NOT RUN AT THIS SCALE: Macro actions add no computation" in out
    assert {p.name for p in (tmp_path / "smoke").iterdir()} == {"claims.csv", "claims.json"}
