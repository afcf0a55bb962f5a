"""The report page: what it holds, that links and pictures are there, and how a browser sees it."""

import json
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import browser
import frames
import pandas as pd
import pytest
from test_claims import SETTINGS

from marlhf import figures, page, report, verdicts

PAIRS = [("macro5", "token"), ("token_matched", "token")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """results/tiny/ with made-up results of fig02_tldr, one chain of quickstart, a bare table5."""
    root = tmp_path_factory.mktemp("page") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARLHF_RESULTS", str(root))
        given = frames.frames(chains=3, every=22, prompts=16)
        given["runs"] = given["runs"].assign(hash=[f"h{i}" for i in range(len(given["runs"]))])
        made = report.tables(given, {**SETTINGS, "thresholds": [1.5, 2.5]}, PAIRS)
        folder = report.results_folder("fig02_tldr", "tiny")
        report.write_tables(folder, made)
        for name in ("fig02_updates", "fig11_norms"):
            figures.curves(made["evals"]).save(folder / f"{name}.png")
        experiment = SimpleNamespace(
            name="fig02_tldr", title="A <title> & more", scale="tiny", task="tldr", seeds=(0, 1, 2),
            arms=figures.arms(made["evals"]), endpoints=SETTINGS,
        )  # fmt: skip
        report.finish(folder, report.facts(experiment, made))
        quick = root / "tiny" / "quickstart"
        shutil.copytree(folder, quick)
        table = report.results_folder("table5_settings", "tiny")
        report.write_tables(
            table, {"ours": pd.DataFrame({"setting": ["ppo.lr"], "deviation": ["×80"]})}
        )
        report.finish(table, {"title": "Settings", "shown": {"ours": "ours beside the paper's"}})
        page.write("tiny")
    return root


@pytest.fixture(autouse=True)
def _there(root, monkeypatch):
    monkeypatch.setenv("MARLHF_RESULTS", str(root))


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture
def text(root):
    return (root / "tiny" / "index.html").read_text(encoding="utf-8")


def test_pictures_have_words_and_files(text, root):
    images = Elements(text).all("img")
    assert len(images) == 2
    for image in images:
        assert len(image["alt"]) > 40 and (root / "tiny" / image["src"]).is_file()
        assert int(image["width"]) > 100


def test_links_resolve_and_nothing_comes_from_outside(text, root):
    page_ = Elements(text)
    ids = [a["id"] for _, a in page_.found if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"] for a in page_.all("a")]
    assert links and not page_.all("script")
    for link in links:
        there = link[1:] in ids if link.startswith("#") else (root / "tiny" / link).is_file()
        assert there, link
    assert "https://" not in text.replace("https://arxiv.org", "") and "http://" not in text


def test_the_page_holds_what_a_reviewer_asks_for(text):
    assert text.index("The paper's claims") < text.index("The questions that decide")
    assert '<span class="badge' in text and "not run at this scale" in text
    assert "A &lt;title&gt; &amp; more" in text and "<title> &" not in text
    for words in (
        "make figure NAME=fig02_tldr", "Figures 2, 3, 10, 11", "What the paper shows",
        "What it does not show", "ppo.macro.termination", "detectable with 80% power",
        "The twin passes", "SCALE=full only", "needs an endpoint or annotators", "×80",
        "minutes of one thread", "0" * 40,
    ):  # fmt: skip
        assert words in text, words
    assert 'id="quickstart"' not in text
    assert [a["name"] for a in Elements(text).all("meta") if "name" in a] == ["viewport"]


def test_time_counts_a_run_once(root):
    found = page.gather("tiny")
    rows = pd.read_csv(root / "tiny" / "fig02_tldr" / "runs.csv")
    assert (found["runs"], found["minutes"]) == (len(rows), pytest.approx(2.0 * len(rows)))


def test_the_table_of_verdicts_is_that_of_the_claims(root):
    found = verdicts.results(verdicts.load(), root / "tiny")
    assert (
        json.loads((root / "tiny" / "claims.json").read_text())[0]["verdict"] == found[0]["verdict"]
    )
    block = page.readme_block(page.gather("tiny"))
    assert block.startswith("| claim | paper |")
    for claim in found:
        assert f"| {claim['id']}. {claim['says']} | {claim['paper']} |" in block
        assert f"| **{claim['verdict']}** |" in block
    assert "(results/tiny/fig02_tldr/fig02_updates.png)" in block
    assert "primary endpoint: mean RM score over training" in block
    assert "| tldr | Gemma-2B: 0.84 → 1.41" in block
    assert "table5_settings/)" not in block
    for line in block.splitlines():  # a table's rows are whole
        assert not line.startswith("|") or line.endswith("|")


def test_the_report_in_markdown(root):
    text = (root / "tiny" / "REPORT.md").read_text(encoding="utf-8")
    assert "](fig02_tldr/fig02_updates.png)" in text and "## What is not here, and why" in text
    assert "\n\n\n\n" not in text


def test_the_readme_is_filled_between_its_markers():
    text = f"# x\n{page.BEGIN}\nold\n{page.END}\nafter\n"
    filled = page.fill(text, "new")
    assert filled == f"# x\n{page.BEGIN}\nnew\n{page.END}\nafter\n"
    assert page.fill(filled, "new") == filled
    with pytest.raises(ValueError, match="once"):
        page.fill("# x\n", "block")


def test_nothing_to_report_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        page.main(["--scale", "full"])
    assert stop.value.code == 2 and "make reproduce SCALE=full" in capsys.readouterr().err


def test_the_main_picture_of_a_figure_comes_first():
    names = ["fig02_differences.png", "fig02_hacking.png", "fig02_seconds.png", "fig02_updates.png"]
    first, *_, last = sorted(names, key=page.place)
    assert (first, last) == ("fig02_updates.png", "fig02_hacking.png")
    for path in (report.HOME / "results" / "tiny").glob("*/summary.json"):
        pictures = json.loads(path.read_text())["pictures"]
        if path.parent.name not in page.LESSONS and pictures:
            assert min(map(page.place, pictures)) == 0, path


def test_figures_stand_in_the_papers_order():
    names = ["table2_scores", "horizon", "fig13_hh", "fig02_tldr", "table5_settings"]
    assert sorted(names, key=page.order) == [
        "fig02_tldr", "fig13_hh", "table2_scores", "table5_settings", "horizon",
    ]  # fmt: skip


@pytest.mark.skipif(browser.CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_finds_nothing_wrong(root):
    with browser.Browser() as chromium:
        for width in (1200, 390):
            chromium.open(root / "tiny" / "index.html", width)
            assert chromium.complaints() == []
            sizes = chromium.value("[...document.images].map(i => i.naturalWidth)")
            assert len(sizes) == 2 and min(sizes) > 0
            assert chromium.value("[...document.images].every(i => i.alt.length > 0)")
            assert chromium.value("document.documentElement.scrollWidth") <= width
            assert chromium.value("document.querySelectorAll('h1').length") == 1
