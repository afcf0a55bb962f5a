"""What is committed under results/tiny: it passed its gates, and it is this code's."""

from pathlib import Path

import pandas as pd
import pytest

from marlhf.config import load_config
from marlhf.identity import source_hash
from marlhf.stages import entry_modules

RESULTS = Path(__file__).resolve().parent.parent / "results" / "tiny"


@pytest.fixture(scope="module")
def folder():
    return RESULTS / "fig02_tldr"


def test_the_twin_passes_its_gates(folder):
    gates = pd.read_csv(folder / "gates.csv")
    assert len(gates) == 6
    failed = gates.loc[~gates["passes"], ["gate", "mean"]]
    assert failed.empty, f"\n{failed.to_string()}"


def test_results_belong_to_this_code(folder):
    """A module that computes runs has changed since: `make reproduce`, and commit results/tiny."""
    runs = pd.read_csv(folder / "runs.csv")
    config = load_config("tldr-tiny")
    for stage in ("sft", "rm", "ppo"):
        found = set(runs.loc[runs["stage"] == stage, "source"])
        assert found == {source_hash(entry_modules(stage, config))}, stage


def test_every_chain_has_every_arm(folder):
    values = pd.read_csv(folder / "evals.csv")
    pairs = values[["arm", "chain"]].drop_duplicates()
    assert len(pairs) == values["arm"].nunique() * values["chain"].nunique() == 30
    assert (values.groupby(["arm", "chain"])["update"].max() == 110).all()


def test_the_pilot_chains_are_not_reported(folder):
    pilot = pd.read_csv(RESULTS / "pilot.csv")
    assert not set(pilot["chain"]) & set(pd.read_csv(folder / "evals.csv")["chain"])
    best = pilot.groupby("lr")["auc_rm"].mean().idxmax()
    assert best == load_config("tldr-tiny").ppo.lr  # as configs/experiments/pilot_tldr.yaml says
