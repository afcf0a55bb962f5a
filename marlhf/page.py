"""The report of a scale, results/<scale>/index.html and REPORT.md, and the README's block: verdicts
first, then every experiment. From files under results/, configs/ and notebooks/ alone; the page
opens offline from its folder.

    python -m marlhf.report --scale tiny
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import mistune
import pandas as pd
from markupsafe import Markup

from marlhf import claims, programs, report, runs, verdicts
from marlhf.config import KEYS, get, read_yaml
from marlhf.experiment import CONFIGS, Experiment, experiments, plan
from marlhf.report import HOME, number, results_root

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
TABLE2 = ("fig02_tldr", "fig13_hh", "fig15_webgpt")
LESSONS = ("quickstart",)  # a first example, not a result
# How the pictures end that show what a figure is about: fig02_updates, fig06_by_length, ...
FIRST = ("updates", "length", "size", "n", "rates", "temperature", "gains", "horizon")
GATES = {  # columns of gates.csv as people read them
    "gate": "gate", "at_least": "at least", "at_most": "at most", "mean": "mean over chains",
    "worst": "worst chain", "chains_passing": "chains passing", "passes": "passes",
}  # fmt: skip


# Notebooks: what they ask, what they say of the paper, what they leave open


@cache
def notebook_of(name: str) -> Path | None:
    """The notebook that makes results/<scale>/<name>/: its own, or one that finishes several."""
    folder = HOME / "notebooks"
    if (own := folder / f"{name}.ipynb").is_file():
        return own
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.ipynb"))}
    return next(
        (p for p, t in texts.items() if "report.finish(" in t and f'\\"{name}\\"' in t), None
    )


@cache
def told(path: Path | None) -> dict[str, str]:
    """A notebook's prose by heading, Markdown: "heading" (the first line), "question", and the text
    under "What the paper shows" and "What it does not show"."""
    if path is None:
        return {}
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    found = {"heading": texts[0].splitlines()[0].lstrip("# ")}
    question = re.search(r"\*\*Question\.\*\*\s*(.+)", texts[0])
    found["question"] = question[1] if question else ""
    for text in texts:
        for part in re.split(r"^## ", text, flags=re.M)[1:]:
            heading, _, body = part.partition("\n")
            found[heading.strip()] = body.strip()
    return found


# One experiment


def order(name: str) -> tuple:
    """Figures in the order of the paper, then tables, then the controls."""
    kind = next((i for i, word in enumerate(("fig", "table")) if name.startswith(word)), 2)
    return kind, name


def finished(scale: str) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Folder and summary of everything under results/<scale>/ that is whole, in order."""
    paths = (results_root() / scale).glob("*/summary.json")
    kept = sorted((p.parent for p in paths if p.parent.name not in LESSONS),
                  key=lambda folder: order(folder.name))  # fmt: skip
    return {f.name: (f, json.loads((f / "summary.json").read_text("utf-8"))) for f in kept}


def arm_settings(name: str, scale: str) -> tuple[str, pd.DataFrame]:
    """The preset of an experiment's arms; a row an arm with the settings in which they differ."""
    found = Experiment.load(name, scale)
    configs = {arm: found.configs[arm, found.seeds[0]] for arm in found.arms}
    differ = [
        key for key in KEYS
        if len({repr(get(config, key)) for config in configs.values()}) > 1
    ]  # fmt: skip
    rows = [
        {"arm": found.arms[arm]} | {key: str(get(config, key)) for key in differ}
        for arm, config in configs.items()
    ]
    return next(iter(configs.values())).name, pd.DataFrame(rows)


def place(picture: str) -> int:
    """Where a picture stands among its experiment's: what the figure shows first, then the rest in
    the order of their names, paired differences and signs of a gamed reward model last."""
    kind = Path(picture).stem.rpartition("_")[2]
    last = {"differences": 2, "signs": 3, "hacking": 3}
    return 0 if kind in FIRST else last.get(kind, 1)


def section(folder: Path, summary: Mapping[str, Any], scale: str) -> dict[str, Any]:
    """What the templates show of an experiment; tables are (caption, frame)."""
    name, tables = folder.name, report.read_tables(folder)
    summary = {"chains": None, "runs": None, **summary}
    book = notebook_of(name)
    prose = told(book)
    says, primary = summary.get("verdicts") or {}, summary.get("primary")
    number_of = re.match(r"((?:Figure|Table)s? [\d, and]+)", prose.get("heading", ""))
    shown = []
    if name in TABLE2 and {"comparisons", "arms"} <= set(tables):
        rows = report.table2({summary["task"]: tables})
        shown.append(
            ("Table 2: the paper's row and ours (in spreads of the SFT model's score)", rows)
        )
    if "table3" in tables:
        rows = programs.table3_wide(tables["table3"])
        shown.append(("Table 3: share of held-out problems solved", rows))
    for table, caption in (summary.get("shown") or {}).items():
        shown.append((caption, tables[table].fillna("")))
    if "arms" in tables:
        caption = "Every endpoint, mean ± half of the 95% interval over chains"
        shown.append((caption, report.arm_table(tables["arms"])))
    preset, settings = None, None
    if name in experiments():
        preset, settings = arm_settings(name, scale)
    gates = tables.get("gates")
    return {
        "name": name, "title": summary.get("title", name), "summary": summary,
        "figures": number_of[1].strip(" ,") if number_of else "",
        "question": prose.get("question", ""),
        "paper": prose.get("What the paper shows", ""),
        "limits": prose.get("What it does not show", ""),
        "pictures": [
            {"file": f"{name}/{file}", "id": f"{name}-{Path(file).stem}", "alt": alt,
             "size": _size(folder / file)}
            for file, alt in sorted(summary["pictures"].items(), key=lambda item: place(item[0]))
        ],
        "tables": shown, "primary": primary,
        "main": [text for key, text in says.items() if key.startswith(f"{primary}: ")],
        "rest": [text for key, text in says.items() if not key.startswith(f"{primary}: ")],
        "power": claims.power_sentences(tables["power"], primary)
        if "power" in tables and primary else [],
        "preset": preset, "settings": settings,
        "gates": gates[list(GATES)].rename(columns=GATES) if gates is not None else None,
        "gate_sentence": claims.gate_sentence(gates) if gates is not None else "",
        "samples": report.wide(tables["samples"]).replace(r"\*(\(.*?\))\*", r"\1", regex=True)
        if "samples" in tables and "policy" in tables["samples"] else None,
        "files": [f"{name}/{file}" for file in summary["tables"]],
        "notebook": book.stem if book else None, "runs": tables.get("runs"),
    }  # fmt: skip


def _size(path: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as image:
        return image.size


# A scale


def absent(scale: str, names: Sequence[str]) -> list[dict[str, str]]:
    """What results/<scale>/ has not, and why: name, title, why."""
    found = []
    for name in sorted(experiments(), key=order):
        if name in (*names, *LESSONS) or name.startswith("pilot"):
            continue
        tree = read_yaml(CONFIGS / "experiments" / f"{name}.yaml")
        why = "not made yet"
        if scale not in tree["chains"]:
            costs = plan("full", [name])["minutes"]
            hours = "not measured" if costs.isna().any() else f"{costs.sum() / 60:.1f} hours"
            why = (f"SCALE=full only: {tree['chains']['full']} chains of {len(tree['arms'])} arms, "
                   f"{hours} of one process, are more than this scale affords")  # fmt: skip
        found.append({"name": name, "title": tree["title"], "why": why})
    books = [p.stem for p in sorted((HOME / "notebooks").glob("*.ipynb"))
             if "report.finish(" in p.read_text(encoding="utf-8")]  # fmt: skip
    for name in books:
        if name not in (*names, *LESSONS, *experiments()):
            found.append({"name": name, "title": told(notebook_of(name))["heading"],
                          "why": "not made yet"})  # fmt: skip
    return found


def gather(scale: str) -> dict[str, Any]:
    """All that the templates read; ValueError if there are no results."""
    folder, done = results_root() / scale, finished(scale)
    if not done:
        raise ValueError(f"no results in {folder}: make reproduce SCALE={scale}")
    sections = [section(path, summary, scale) for path, summary in done.values()]
    manifests = [each["runs"] for each in sections if each["runs"] is not None]
    every = pd.concat(manifests).drop_duplicates("hash") if manifests else pd.DataFrame()
    dirty = bool(every["dirty"].fillna(False).astype(bool).any()) if "dirty" in every else False
    facts = [each["summary"] for each in sections]
    judged = verdicts.results(verdicts.load(), folder)
    words = [claim["verdict"] for claim in judged if claim["kind"] == "claim"]
    return {
        "scale": scale, "sections": sections,
        "claims": judged, "counts": {v: words.count(v) for v in verdicts.VERDICTS if v in words},
        "absent": absent(scale, list(done)),
        "runs": len(every), "minutes": float(every["minutes"].sum()) if len(every) else 0.0,
        "revisions": sorted({r for f in facts for r in f.get("revisions", ())}), "dirty": dirty,
        "devices": sorted({d for f in facts for d in f.get("devices", ())}),
        "versions": {k: v for f in facts for k, v in (f.get("versions") or {}).items()},
    }  # fmt: skip


# Templates


def rows(frame: pd.DataFrame) -> list[list[str]]:
    """Cells as text: floats to three digits, missing ones empty."""

    def cell(x: Any) -> str:
        if isinstance(x, float):
            return "" if pd.isna(x) else number(x)
        return {True: "yes", False: "no"}[bool(x)] if isinstance(x, bool) else str(x)

    return [[cell(x) for x in line] for line in frame.astype(object).itertuples(index=False)]


def prose(text: str) -> Markup:
    """Markdown of a notebook as HTML; its own HTML is escaped."""
    return Markup(mistune.create_markdown(escape=True, plugins=["table"])(text))


def render(template: str, **context: Any) -> str:
    """A template of marlhf/templates; HTML is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"rows": rows, "prose": prose, "markdown": report.markdown,
                            "slug": lambda text: re.sub(r"\W+", "-", text)}  # fmt: skip
    text = environment.get_template(template).render(**context)
    return re.sub(r"\n{3,}", "\n\n", text) if template.endswith(".md") else text


def readme_block(found: Mapping[str, Any]) -> str:
    """The computed part of the README: verdicts, figure and table of TL;DR, Tables 2 and 3, and for
    each experiment the verdicts on its primary endpoint and its gates. found: `gather`."""
    many = [s for s in found["sections"] if (s["summary"].get("chains") or 0) > 1]
    by_name = {each["name"]: each for each in many}
    place = f"{results_root().name}/{found['scale']}"
    made = {
        by_name[name]["summary"]["task"]: report.read_tables(
            results_root() / found["scale"] / name)
        for name in TABLE2 if name in by_name
    }  # fmt: skip
    return render(
        "block.md", place=place, first=by_name.get("fig02_tldr"), many=many,
        table2=report.table2(made) if made else None,
        table3=dict(by_name["table3_apps"]["tables"]).get(
            "Table 3: share of held-out problems solved") if "table3_apps" in by_name else None,
        **found,
    ).strip()  # fmt: skip


def fill(text: str, block: str) -> str:
    """`text` with the part between the markers replaced; ValueError if they are not there once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md must hold {BEGIN} and {END} once each")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.partition(END)[2]}"


def write(scale: str) -> dict[str, Any]:
    """claims.csv, claims.json, REPORT.md and index.html of a scale; returns what `gather` found."""
    folder, found = results_root() / scale, gather(scale)
    verdicts.write(found["claims"], folder)
    runs.atomic_write(folder / "REPORT.md", render("report.md", **found))
    runs.atomic_write(folder / "index.html", render("page.html", **found))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The report of a scale: claims.csv, claims.json, REPORT.md and index.html under
    results/<scale>/; at tiny, the README's block too."""
    parser = argparse.ArgumentParser(prog="python -m marlhf.report", description=main.__doc__)
    parser.add_argument("--scale", default="tiny")
    options = parser.parse_args(arguments)
    try:
        found = write(options.scale)
        print(f"{results_root() / options.scale}: index.html, REPORT.md and claims.csv written")
        if options.scale == "tiny":
            path = HOME / "README.md"
            runs.atomic_write(path, fill(path.read_text(encoding="utf-8"), readme_block(found)))
            print("README.md: results block written")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
