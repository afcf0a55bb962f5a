"""Verdicts by hand: every outcome of the rule, at its borders, and the file of claims itself."""

import json
import math
import re

import pandas as pd
import pytest
import yaml

from marlhf import claims, verdicts
from marlhf.config import CONFIGS, ConfigError, read_yaml
from marlhf.experiment import Experiment
from marlhf.verdicts import CANNOT_TELL, FAILS, HOLDS, NOT_RUN, UNTESTED, Part

PART = {
    "says": "the end", "experiment": "fig02_tldr", "endpoint": "final RM score", "arm": "macro5",
    "reference": "token", "as": "difference", "matters": 0.05, "chains": 6,
}  # fmt: skip
T2, T1 = 4.302652729911275, 12.706204736432095  # t quantiles at 0.975, 2 and 1 degrees of freedom


def part(**changes):
    entry = {**PART, **changes}
    return Part(**{("measure" if key == "as" else key): value for key, value in entry.items()})


def put(folder, values, unit="score", endpoint="final RM score", censored=(), name="fig02_tldr"):
    """results/<scale>/<name>/ with one endpoint: values {arm: a number a chain}."""
    rows = [
        {"arm": arm, "label": arm.upper(), "chain": chain, "endpoint": endpoint, "unit": unit,
         "value": x, "censored": (arm, chain) in censored}
        for arm, numbers in values.items() for chain, x in enumerate(numbers)
    ]  # fmt: skip
    (folder / name).mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / name / "endpoints.csv", index=False)
    (folder / name / "summary.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    "low, high, wanted",
    [
        (0.001, 0.9, HOLDS),
        (0.001, 0.01, HOLDS),  # above 0 comes first; that it is small is noted
        (0.0, 0.9, CANNOT_TELL),  # touches 0
        (-0.1, 0.05, CANNOT_TELL),  # touches what matters
        (-0.1, 0.0499, FAILS),
        (-0.3, -0.1, FAILS),
        (-math.inf, math.inf, CANNOT_TELL),
    ],
)
def test_the_rule_at_its_borders(low, high, wanted):
    assert verdicts.verdict(low, high, 0.05) == wanted


@pytest.mark.parametrize(
    "parts, wanted",
    [
        ([HOLDS, HOLDS], HOLDS),
        ([HOLDS, UNTESTED], HOLDS),
        ([HOLDS, CANNOT_TELL], CANNOT_TELL),
        ([HOLDS, FAILS, CANNOT_TELL, NOT_RUN], FAILS),
        ([HOLDS, NOT_RUN], CANNOT_TELL),
        ([NOT_RUN, UNTESTED], NOT_RUN),
        ([UNTESTED], UNTESTED),
    ],
)
def test_a_claim_from_its_parts(parts, wanted):
    assert verdicts.overall(parts) == wanted


def test_a_difference_by_hand(tmp_path):
    folder = put(tmp_path, {"macro5": [1.1, 1.3, 1.5], "token": [1.0, 1.1, 1.2]})
    row = verdicts.judge(part(), folder)  # differences 0.1, 0.2, 0.3: mean 0.2, sd 0.1
    half = T2 * 0.1 / math.sqrt(3)
    assert (row["estimate"], row["n"]) == (pytest.approx(0.2), 3)
    assert (row["low"], row["high"]) == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))
    assert row["verdict"] == CANNOT_TELL  # 0.2 - 0.248 < 0, and 0.448 > 0.05
    assert verdicts.judge(part(matters=0.5), folder)["verdict"] == FAILS
    row = verdicts.judge(part(arm="token", reference="macro5"), folder)
    assert row["estimate"] == pytest.approx(-0.2)


def test_sooner_is_a_ratio_of_times(tmp_path):
    times = {"macro5": [10, 10, 10], "token": [20, 25, 16]}
    folder = put(tmp_path, times, "updates", censored={("token", 1), ("token", 2)})
    row = verdicts.judge(part(**{"as": "sooner", "matters": 1.2}), folder)
    assert row["estimate"] == pytest.approx(8000 ** (1 / 3) / 10)  # 2.0
    assert row["verdict"] == HOLDS
    assert row["note"].startswith("missed by 2 of 3 with TOKEN")
    assert "2.00 times as soon [" in verdicts.words(row | {"measure": "sooner"})
    slower = part(**{"as": "sooner", "matters": 1.2, "arm": "token", "reference": "macro5"})
    row = verdicts.judge(slower, folder)
    assert row["estimate"] == pytest.approx(0.5) and row["verdict"] == FAILS


@pytest.mark.parametrize(
    "ratio, spread, wanted",
    [
        (0.97, 0.0, HOLDS),  # 3% slower, known exactly: within the 5% that are let pass
        (0.97, 0.05, CANNOT_TELL),
        (0.90, 0.001, FAILS),
        (0.96, 0.03, CANNOT_TELL),
        (0.951, 0.0, HOLDS),
        (0.949, 0.0, FAILS),
    ],
)
def test_at_least_lets_a_cost_pass(tmp_path, ratio, spread, wanted):
    reference = [ratio * (1 - spread), ratio, ratio * (1 + spread)]
    folder = put(tmp_path, {"macro5": [1.0] * 3, "token": reference}, claims.COST)
    cost = part(**{"as": "sooner", "matters": 1.0, "at_least": 0.95})
    row = verdicts.judge(cost, folder)
    assert row["verdict"] == wanted
    assert row["estimate"] == pytest.approx(ratio, abs=2e-3)  # the ratio itself, not moved
    assert "times as fast" in verdicts.words(row | {"measure": "sooner"})


def test_a_share_is_against_chance(tmp_path):
    folder = put(tmp_path, {"macro5": [0.6, 0.7]}, "share")
    share = part(**{"as": "share", "reference": None})
    row = verdicts.judge(share, folder)
    half = T1 * 0.1 / math.sqrt(2) / math.sqrt(2)
    assert row["estimate"] == pytest.approx(0.65)
    assert row["high"] == pytest.approx(0.65 + half)
    assert row["verdict"] == CANNOT_TELL
    assert verdicts.words(row | {"measure": "share"}).startswith("65.0% [1.5, 128.5], 2 chains")
    folder = put(tmp_path, {"macro5": [0.51, 0.52, 0.53]}, "share")
    assert verdicts.judge(share, folder)["verdict"] == FAILS  # 0.02 ± 0.0248: below 0.05
    folder = put(tmp_path, {"macro5": [0.51, 0.53, 0.55]}, "share")
    assert verdicts.judge(share, folder)["verdict"] == CANNOT_TELL  # 0.03 ± 0.0497
    folder = put(tmp_path, {"macro5": [0.519, 0.52, 0.521]}, "share")
    row = verdicts.judge(share, folder)
    assert row["verdict"] == HOLDS and row["note"] == "below the 0.05 that matters"
    folder = put(tmp_path, {"macro5": [0.499, 0.50, 0.501]}, "share")
    assert verdicts.judge(share, folder)["verdict"] == FAILS


def test_one_chain_cannot_tell(tmp_path):
    folder = put(tmp_path, {"macro5": [3.0], "token": [1.0]})
    row = verdicts.judge(part(), folder)
    assert row["verdict"] == CANNOT_TELL
    assert verdicts.words(row | {"measure": "difference"}) == (
        "+2 (a single chain has no interval)"
    )


def test_what_was_not_run_says_so(tmp_path):
    assert verdicts.judge(part(), tmp_path)["verdict"] == NOT_RUN
    folder = put(tmp_path, {"macro5": [3.0], "token": [1.0]}, endpoint="another")
    row = verdicts.judge(part(), folder)
    assert row["verdict"] == NOT_RUN and "«final RM score»" in row["note"]
    (folder / "fig02_tldr" / "summary.json").unlink()  # a run in progress
    assert verdicts.judge(part(), folder)["note"] == "no results of fig02_tldr"
    assert verdicts.judge(Part("x", "needs people"), folder) == {
        "verdict": UNTESTED, "note": "needs people",
    }  # fmt: skip


def test_results_that_do_not_fit_are_refused(tmp_path):
    folder = put(tmp_path, {"macro5": [3.0, 2.0]})
    with pytest.raises(ValueError, match="no arm 'token'.*make figure NAME=fig02_tldr"):
        verdicts.judge(part(), folder)
    folder = put(tmp_path, {"macro5": [3.0, 2.0], "token": [1.0]})
    with pytest.raises(ValueError, match=r"endpoints.csv.*within the same chains"):
        verdicts.judge(part(), folder)
    folder = put(tmp_path, {"macro5": [3.0, 2.0], "token": [0.0, 1.0]})
    with pytest.raises(ValueError, match="no ratio"):
        verdicts.judge(part(**{"as": "sooner", "matters": 1.2}), folder)
    folder = put(tmp_path, {"macro5": [3.0, float("nan")], "token": [0.0, 1.0]})
    with pytest.raises(ValueError, match="nan"):
        verdicts.judge(part(), folder)


def test_shares_differ_in_points(tmp_path):
    folder = put(tmp_path, {"macro5": [0.5, 0.6], "token": [0.4, 0.5]}, "share")
    row = verdicts.judge(part(matters=0.02), folder) | {"measure": "difference"}
    assert verdicts.words(row).startswith("+10 points [+10, +10], 2 chains")


def test_the_files(tmp_path):
    folder = put(tmp_path, {"macro5": [3.0], "token": [1.0]})
    (folder / "a.png").touch()
    rows = [part(), Part("by people", "needs people")]
    found = verdicts.results(
        [
            verdicts.Claim("claim", "1", "it gains", "+68%", "a.png", tuple(rows)),
            verdicts.Claim("question", "A", "more", "none", "b.png", (part(experiment="horizon"),)),
        ],
        folder,
    )
    assert [each["verdict"] for each in found] == [CANNOT_TELL, NOT_RUN]
    assert [each["picture"] for each in found] == ["a.png", None]
    verdicts.write(found, folder)
    table = pd.read_csv(folder / "claims.csv")
    assert list(table["verdict"]) == [CANNOT_TELL, UNTESTED, NOT_RUN]
    assert table["words"][1] == "needs people"
    (first, _) = json.loads((folder / "claims.json").read_text())
    assert first["parts"][0]["estimate"] == 2 and first["parts"][0]["high"] is None
    text = verdicts.listing(found)
    assert "1  CANNOT TELL: it gains" in text and "paper: +68%" in text


# The file


def changed(tmp_path, where, key, value):
    """A file of one claim in which a key is set, or taken out."""
    entry = {"id": 1, "says": "x", "paper": "y", "picture": "z.png", "parts": [dict(PART)]}
    target = {"top": (tree := {"claims": [entry]}), "claim": entry, "part": entry["parts"][0]}
    if value is None:
        target[where].pop(key)
    else:
        target[where][key] = value
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True))
    return path


@pytest.mark.parametrize(
    "where, key, value, words",
    [
        ("top", "claim", [], "unknown key 'claim'.*claims"),
        ("claim", "say", "x", "claim 1: unknown key 'say'.*says"),
        ("claim", "paper", None, "claim 1: paper is missing"),
        ("part", "chain", 3, "claim 1: part 1: unknown key 'chain'.*chains"),
        ("part", "endpoint", None, "part 1: endpoint is missing"),
        ("part", "experiment", "fig02", "unknown experiment 'fig02'.*fig02_tldr"),
        ("part", "arm", "macro6", "arm: fig02_tldr has no arm 'macro6'.*macro5"),
        ("part", "reference", "tokens", "reference: fig02_tldr has no arm 'tokens'.*token"),
        ("part", "reference", None, "reference: difference has one"),
        ("part", "as", "ratio", "as: unknown 'ratio'"),
        ("part", "as", "share", "reference: share has none"),
        ("part", "as", "sooner", "matters must be a number of at least 1, not 0.05"),
        ("part", "matters", "much", "matters must be a number"),
        ("part", "at_least", 0.9, "at_least goes with as: sooner"),
        ("part", "chains", 2.5, "chains must be a count"),
        ("part", "untested", "people", "untested stands with says alone"),
    ],
)
def test_a_slip_in_the_file_is_named(tmp_path, where, key, value, words):
    path = changed(tmp_path, where, key, value)
    with pytest.raises(ConfigError, match=words) as error:
        verdicts.load(path)
    assert str(path) in str(error.value)


def test_ids_are_there_once(tmp_path):
    path = changed(tmp_path, "claim", "id", 1)
    tree = read_yaml(path)
    path.write_text(yaml.safe_dump(tree | {"questions": tree["claims"]}))
    with pytest.raises(ConfigError, match="id 1 is there twice"):
        verdicts.load(path)


COMMITTED = [(claim, part) for claim in verdicts.load() for part in claim.parts]
TESTED = [(claim, part) for claim, part in COMMITTED if not part.untested]
# endpoints that notebooks of their own make: fig04, fig08, fig21
OTHERS = (
    r"win rate on (tldr|hh), (true|RM) score"
    r"|agreement on (tldr|hh), RM score and true score"
    r"|RM score at temperature \S+|RM score, mean over temperatures"
    r"|RM score of the best of \d+, mean over temperatures"
)


def test_the_twelve_claims_and_the_questions():
    found = verdicts.load()
    assert [claim.id for claim in found if claim.kind == "claim"] == [str(i) for i in range(1, 13)]
    assert [claim.id for claim in found if claim.kind == "question"] == ["A", "B", "C"]
    assert all(re.fullmatch(r"\w+/\w+\.png", claim.picture) for claim in found)


@pytest.mark.parametrize("claim, part", TESTED, ids=lambda x: getattr(x, "id", x.says)[:40])
def test_each_endpoint_is_one_that_its_experiment_makes(claim, part):
    names = verdicts.JOINT.get(part.experiment, (part.experiment,))
    made = set()
    for name in names:
        settings = read_yaml(CONFIGS / "experiments" / f"{name}.yaml")["endpoints"]
        kinds = [settings["primary"], *settings.get("others", ())]
        for measure in {settings["score"], "true_score"}:
            for threshold in settings.get("thresholds", [None]):
                made |= {claims.endpoint_title(kind, measure, threshold) for kind in kinds}
    made |= {*claims.NORMS, claims.COST}
    made |= {"pass@1", "pass@5"} if part.experiment == "table3_apps" else set()
    assert part.endpoint in made or re.fullmatch(OTHERS, part.endpoint)


@pytest.mark.parametrize("claim, part", TESTED, ids=lambda x: getattr(x, "id", x.says)[:40])
def test_tiny_has_the_chains_that_the_claim_names(claim, part):
    names = verdicts.JOINT.get(part.experiment, (part.experiment,))
    chains = [len(Experiment.load(name).seeds) for name in names]
    task = re.search(r" on (\w+),", part.endpoint)
    if len(names) > 1:  # of several experiments, the one of the endpoint's task
        (chains,) = (
            [n] for n, name in zip(chains, names, strict=True) if name.endswith("_" + task[1])
        )
    assert chains == [part.chains]
