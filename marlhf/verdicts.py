"""The paper's claims and what becomes of each: configs/claims.yaml, whose header is the rule, on
results/<scale>/<experiment>/endpoints.csv.

A part of a claim is one number over paired chains with its 95% t interval, on the scale where 0 is
no gain; its verdict is the interval's. No verdict is written by hand.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from marlhf import runs, stats
from marlhf.claims import COST, number, pair
from marlhf.config import CONFIGS, ConfigError, nearest, read_yaml

HOLDS, FAILS, CANNOT_TELL = "holds", "fails", "cannot tell"
UNTESTED, NOT_RUN = "not tested here", "not run at this scale"
VERDICTS = (HOLDS, FAILS, CANNOT_TELL, UNTESTED, NOT_RUN)
KINDS = {"claims": "claim", "questions": "question"}
MEASURES = ("difference", "sooner", "share")
# Notebooks that compare the policies of several experiments and have no file of their own.
JOINT = {"fig04_win_rates": ("fig02_tldr", "fig13_hh")}


@dataclass(frozen=True)
class Part:
    """One comparison of a claim: a line under `parts` in configs/claims.yaml. `measure` is the
    file's `as`; `untested` is the reason why a part has none of the rest."""

    says: str
    untested: str | None = None
    experiment: str | None = None
    endpoint: str | None = None
    arm: str | None = None
    reference: str | None = None
    measure: str | None = None
    matters: float | None = None
    at_least: float | None = None
    chains: int | None = None

    @property
    def threshold(self) -> float:
        """The smallest gain that matters, where 0 is no gain."""
        return math.log(self.matters) if self.measure == "sooner" else self.matters


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, or (kind "question") a question that its reviewers asked."""

    kind: str
    id: str
    says: str
    paper: str
    picture: str
    parts: tuple[Part, ...]


# Reading the file


def load(path: Path | None = None) -> list[Claim]:
    """Claims, then questions. ConfigError names the file, the claim, its part and the key."""
    path = path or CONFIGS / "claims.yaml"
    tree = read_yaml(path)
    _known(tree, KINDS, f"{path}: ")
    found = []
    for section, kind in KINDS.items():
        for entry in tree.get(section) or []:
            where = f"{path}, {kind} {entry.get('id', len(found) + 1)}: "
            names = ("id", "says", "paper", "picture", "parts")
            _known(entry, names, where)
            for name in names:
                _need(bool(entry.get(name)), f"{where}{name} is missing")
            parts = tuple(
                _part(part, f"{where}part {i}: ") for i, part in enumerate(entry["parts"], 1)
            )
            rest = {name: str(entry[name]) for name in names[:-1]}
            found.append(Claim(kind, **rest, parts=parts))
    ids = [claim.id for claim in found]
    for claim in found:
        _need(ids.count(claim.id) == 1, f"{path}: id {claim.id} is there twice")
    return found


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _known(entry: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for key in entry:
        _need(key in names, f"{where}unknown key {key!r}.{nearest(str(key), names)}")


def _part(entry: Mapping[str, Any], where: str) -> Part:
    names = ("says", "untested", "experiment", "endpoint", "arm", "reference", "as", "matters")
    names += ("at_least", "chains")
    _known(entry, names, where)
    _need(bool(entry.get("says")), f"{where}says is missing")
    if "untested" in entry:
        _need(set(entry) == {"says", "untested"}, f"{where}untested stands with says alone")
        _need(bool(entry["untested"]), f"{where}untested must give the reason")
        return Part(str(entry["says"]), str(entry["untested"]))
    for name in ("experiment", "endpoint", "arm", "as", "matters", "chains"):
        _need(entry.get(name) is not None, f"{where}{name} is missing")
    measure, matters, least = entry["as"], entry["matters"], entry.get("at_least")
    _need(measure in MEASURES, f"{where}as: unknown {measure!r}.{nearest(str(measure), MEASURES)}")
    paired = entry.get("reference") is not None
    _need(paired == (measure != "share"), f"{where}reference: {measure} has "
          f"{'none (null)' if paired else 'one'}")  # fmt: skip
    arms = experiment_arms(str(entry["experiment"]), where)
    for name in ("arm", "reference") if paired else ("arm",):
        value = entry[name]
        _need(value in arms, f"{where}{name}: {entry['experiment']} has no arm {value!r}."
              f"{nearest(str(value), arms)}")  # fmt: skip
    lowest = 1 if measure == "sooner" else 0
    _need(_is_number(matters) and matters >= lowest,
          f"{where}matters must be a number of at least {lowest}, not {matters!r}")  # fmt: skip
    _need(least is None or (measure == "sooner" and _is_number(least) and 0 < least <= 1),
          f"{where}at_least goes with as: sooner and lies in (0, 1], not {least!r}")  # fmt: skip
    chains = entry["chains"]
    _need(type(chains) is int and chains > 0, f"{where}chains must be a count, not {chains!r}")
    rest = {key: value for key, value in entry.items() if key != "as"}
    return Part(**rest, measure=measure)


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def experiment_arms(name: str, where: str = "") -> list[str]:
    """Arms of an experiment, or those that all experiments of a joint notebook have."""
    folder = CONFIGS / "experiments"
    if not (folder / f"{name}.yaml").is_file():
        known = [*sorted(path.stem for path in folder.glob("*.yaml")), *JOINT]
        _need(name in JOINT, f"{where}unknown experiment {name!r}.{nearest(name, known)}")
        first, *others = (experiment_arms(each, where) for each in JOINT[name])
        return [arm for arm in first if all(arm in arms for arms in others)]
    return list(read_yaml(folder / f"{name}.yaml")["arms"])


# The rule


def verdict(low: float, high: float, threshold: float) -> str:
    """What a 95% interval says of a gain, 0 being none, `threshold` the smallest that matters."""
    if low > 0:
        return HOLDS
    return FAILS if high < threshold else CANNOT_TELL


def overall(verdicts: Sequence[str]) -> str:
    """A claim's verdict from its parts': one that fails is enough; all that can be tested here
    must hold. A part that was not run at this scale leaves open what its claim comes to."""
    tested = [each for each in verdicts if each != UNTESTED]
    if not tested:
        return UNTESTED
    if all(each == NOT_RUN for each in tested):
        return NOT_RUN
    if FAILS in tested:
        return FAILS
    return HOLDS if all(each == HOLDS for each in tested) else CANNOT_TELL


def gain(part: Part, a: Sequence[float], b: Sequence[float] | None) -> stats.Interval:
    """The part's number over chains where 0 is no gain; a of the arm, b of the reference."""
    a = np.asarray(a, dtype=float)
    if part.measure == "share":
        return stats.mean_interval(a - 0.5)
    if part.measure == "difference":
        return stats.paired_interval(a, b)
    ratio = np.asarray(b, dtype=float), a
    if min(map(np.min, ratio)) <= 0:
        raise ValueError("a time or norm of 0 has no ratio")
    return stats.paired_interval(*(np.log(x / factor) for x, factor in
                                   zip(ratio, (part.at_least or 1, 1), strict=True)))  # fmt: skip


def readable(part: Part, x: float) -> float:
    """A number of `gain` in the unit that people read: a difference, a ratio, a share."""
    if part.measure == "share":
        return x + 0.5
    if part.measure == "difference":
        return x
    return math.exp(min(x, 700)) * (part.at_least or 1)


def judge(part: Part, folder: Path) -> dict[str, Any]:
    """The part's estimate, interval (in the unit that people read), chains, verdict, and what is
    to be known beside it, from the results of a scale, results/<scale>/. ValueError names an
    endpoints.csv that is older than the claim."""
    if part.untested:
        return {"verdict": UNTESTED, "note": part.untested}
    path = folder / str(part.experiment) / "endpoints.csv"
    if not (path.parent / "summary.json").is_file() or not path.is_file():
        return {"verdict": NOT_RUN, "note": f"no results of {part.experiment}"}
    values = pd.read_csv(path)
    values = values[values["endpoint"] == part.endpoint]
    if values.empty:
        return {"verdict": NOT_RUN, "note": f"{part.experiment} has no «{part.endpoint}»"}
    names = [name for name in (part.arm, part.reference) if name]
    for name in names:
        if not (values["arm"] == name).any():
            raise ValueError(f"{path}: no arm {name!r} in {part.endpoint!r}; make it again: "
                             f"make figure NAME={part.experiment}")  # fmt: skip
    try:
        rows = pair(values, *names) if part.reference else [values[values["arm"] == part.arm]]
        found = gain(part, *(table["value"] for table in rows), *([None] * (2 - len(rows))))
    except ValueError as error:
        raise ValueError(f"{path}, {part.endpoint!r}: {error}") from None
    words = verdict(found.low, found.high, part.threshold)
    return {
        "verdict": words, "unit": rows[0]["unit"].iloc[0], "n": found.n,
        "label": rows[0]["label"].iloc[0], "other": rows[-1]["label"].iloc[0],
        "estimate": readable(part, found.mean), "low": readable(part, found.low),
        "high": readable(part, found.high), "note": _note(part, rows, found, words),
    }  # fmt: skip


def _note(part: Part, rows: Sequence[pd.DataFrame], found: stats.Interval, words: str) -> str:
    notes = []
    if words == HOLDS and found.high < part.threshold:
        notes.append(f"below the {number(part.matters)} that matters")
    missed = [
        f"{int(table['censored'].sum())} of {len(table)} with {table['label'].iloc[0]}"
        for table in rows
        if table["censored"].any()
    ]
    if missed:
        notes.append(f"missed by {' and '.join(missed)}, counted as the end of training")
    return "; ".join(notes)


# Results


def words(row: Mapping[str, Any]) -> str:
    """A judged part in the unit that people read: 1.96 times as soon [1.49, 2.57], 6 chains."""
    if row["verdict"] in (UNTESTED, NOT_RUN):
        return row["note"]
    shown = row["estimate"], row["low"], row["high"]
    if row["measure"] == "sooner":
        mean, low, high = (f"{x:.2f}" for x in shown)
        # of a time, or of what is to be small
        mean += (
            " times as soon"
            if row["unit"] in ("updates", "seconds")
            else (
                " times as fast" if row["unit"] == COST else f" times as large with {row['other']}"
            )
        )
    elif row["measure"] == "share":
        mean, low, high = (f"{100 * x:.1f}" for x in shown)
        mean += "%"
    else:
        points = row["unit"] == "share"
        mean, low, high = (_signed(100 * x if points else x) for x in shown)
        mean += " points" if points else ""
    if row["n"] == 1:
        return f"{mean} (a single chain has no interval)"
    note = f" ({row['note']})" if row["note"] else ""
    return f"{mean} [{low}, {high}], {row['n']} chains{note}"


def _signed(x: float) -> str:
    return ("+" if x > 0 else "") + number(x)


def results(claims: Sequence[Claim], folder: Path) -> list[dict[str, Any]]:
    """Every claim with its verdict, its picture (null where it was not made) and its parts, judged
    on results/<scale>/; each part has its `words`."""
    found = []
    for claim in claims:
        parts = []
        for part in claim.parts:
            row = asdict(part) | {"n": 0, "note": ""} | judge(part, folder)
            parts.append(row | {"words": words(row)})
        head = {name: getattr(claim, name) for name in ("kind", "id", "says", "paper", "picture")}
        head["picture"] = claim.picture if (folder / claim.picture).is_file() else None
        found.append(head | {"verdict": overall([p["verdict"] for p in parts]), "parts": parts})
    return found


def write(found: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """claims.csv (a row a part) and claims.json in results/<scale>/."""
    rows = [
        {"claim": claim["id"], "says": claim["says"], "claim_verdict": claim["verdict"]}
        | {("part" if key == "says" else key): value for key, value in part.items()}
        for claim in found
        for part in claim["parts"]
    ]
    table = pd.DataFrame(rows).to_csv(index=False, float_format="%.5g", lineterminator="\n")
    folder.mkdir(parents=True, exist_ok=True)
    runs.atomic_write(folder / "claims.csv", table)
    text = json.dumps(_plain(found), indent=1, ensure_ascii=False, allow_nan=False)
    runs.atomic_write(folder / "claims.json", text + "\n")


def _plain(x: Any) -> Any:
    """JSON's own types; five digits, null for what is not finite."""
    if isinstance(x, Mapping):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.5g}") if math.isfinite(x) else None
    return x


def listing(found: Sequence[Mapping[str, Any]]) -> str:
    """For a terminal: a claim, what the paper says, its parts."""
    lines = []
    for claim in found:
        lines += ["", f"{claim['id']:>2}  {claim['verdict'].upper()}: {claim['says']}"]
        lines += [f"    paper: {claim['paper']}"]
        lines += [f"    {p['verdict']}: {p['says']}: {p['words']}" for p in claim["parts"]]
    return "\n".join(lines[1:])
