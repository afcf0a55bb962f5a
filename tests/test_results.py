"""What is committed under results/tiny: the twins passed their gates, and it is this code's."""

from pathlib import Path

import pandas as pd
import pytest

from marlhf import verdicts
from marlhf.experiment import Experiment
from marlhf.identity import source_hash
from marlhf.stages import entry_modules

RESULTS = Path(__file__).resolve().parent.parent / "results" / "tiny"
GATED = ("fig02_tldr", "fig13_hh", "fig15_webgpt", "table3_apps")
SAMPLED = ("fig08_best_of_n", "fig21_temperature")  # policies of fig02_tldr, no curves
TRAINED = (
    *GATED,
    *("fig05_termination", "fig06_ngram", "fig07_ngram_hh", "fig09_scaling"),
    *("fig19_value_weights", "horizon"),
)
EVERY = pytest.mark.parametrize("name", TRAINED)


def table(name, kind):
    return pd.read_csv(RESULTS / name / f"{kind}.csv")


@pytest.mark.parametrize("name", GATED)
def test_the_twin_passes_its_gates(name):
    gates = table(name, "gates")
    assert len(gates) == (2 if name == "table3_apps" else 6)
    failed = gates.loc[~gates["passes"], ["gate", "mean"]]
    assert failed.empty, f"\n{failed.to_string()}"


@pytest.mark.parametrize("name", [*TRAINED, *SAMPLED])
def test_results_belong_to_this_code(name):
    """A module that computes runs has changed since: `make reproduce`, and commit results/tiny."""
    runs, configs = table(name, "runs"), Experiment.load(name).configs.values()
    for stage, found in runs.groupby("stage")["source"]:
        assert set(found) == {source_hash(entry_modules(stage, c)) for c in configs}, stage


def test_every_part_of_every_claim_has_been_computed():
    """`make reproduce` ends with the verdicts: none is missing, and each has its chains."""
    parts = pd.read_csv(RESULTS / "claims.csv")
    judged = parts[parts["verdict"] != verdicts.UNTESTED]
    assert set(judged["verdict"]) <= {verdicts.HOLDS, verdicts.FAILS, verdicts.CANNOT_TELL}
    assert (judged["n"] == judged["chains"]).all()
    assert len(parts) == sum(len(claim.parts) for claim in verdicts.load())


@EVERY
def test_every_chain_has_every_arm_of_the_file(name):
    values, experiment = table(name, "evals"), Experiment.load(name)
    assert set(zip(values["arm"], values["chain"], strict=True)) == set(experiment.configs)
    for key, last in values.groupby(["arm", "chain"])["update"].max().items():
        assert last == experiment.configs[key].ppo.updates


@pytest.mark.parametrize(
    "file, name, score",
    [("pilot", "fig02_tldr", "auc_rm"), ("pilot_apps", "table3_apps", "auc_true")],
)
def test_the_pilots_chose_the_rates_and_are_not_reported(file, name, score):
    pilot = pd.read_csv(RESULTS / f"{file}.csv")
    assert not set(pilot["chain"]) & set(table(name, "evals")["chain"])
    best = pilot.groupby("lr")[score].mean().idxmax()
    assert {c.ppo.lr for c in Experiment.load(name).configs.values()} == {best}
