"""People as judges: a widget for JupyterLab that shows blinded pairs and stores each answer.

Answers are appended to a .jsonl file, one a line, flushed to the disk before the next pair is
shown; a later answer of the same annotator to the same pair replaces the earlier one. Nothing on
the screen tells the arms apart: the side of each is drawn by annotator and pair.
"""

import hashlib
import html
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from marlhf.identity import keyed_rng

ANSWERS = {"A": "A is better", "B": "B is better", "tie": "tie"}
NEEDED = ("prompt", "response", "reference_response")


def pair_id(pair: Mapping[str, Any]) -> str:
    """Twelve digits of what is judged: prompt and both responses. Whoever made them, the same texts
    are the same pair."""
    text = json.dumps([pair[name] for name in NEEDED])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def swapped(seed: int | str, pair: Mapping[str, Any]) -> bool:
    """Whether the arm's response stands second (B, right) for this judge."""
    return bool(keyed_rng(seed, "sides", pair_id(pair)).integers(2))


def read_answers(path: str | Path) -> pd.DataFrame:
    """The stored answers that count, the last of each annotator and pair: annotator, pair, outcome
    (1 where the arm's response is preferred, -1, 0). A line that a killed process left half written
    is passed over. Raises ValueError, naming file and line, for another that cannot be read."""
    path, rows = Path(path), []
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            rows.append({name: row[name] for name in ("annotator", "pair", "outcome")})
        except (ValueError, KeyError, TypeError):
            if number == len(lines):  # no line end: it was being written
                continue
            raise ValueError(
                f"{path}, line {number} is not an answer: mend or delete that line"
            ) from None
    table = pd.DataFrame(rows, columns=["annotator", "pair", "outcome"])
    return table.drop_duplicates(["annotator", "pair"], keep="last").reset_index(drop=True)


def votes(path: str | Path, pairs: pd.DataFrame) -> pd.DataFrame:
    """Outcomes of these pairs, a row a pair and a column an annotator; NaN where there is no
    answer. For `winrates.agreements`, beside the columns of other judges."""
    stored = read_answers(path)
    ids = [pair_id(pair) for pair in pairs.to_dict("records")]
    columns = {
        name: pd.Series(ids).map(dict(zip(rows["pair"], rows["outcome"], strict=True)))
        for name, rows in stored.groupby("annotator", sort=False)
    }
    return pd.DataFrame(columns, index=range(len(ids))).astype(float).set_index(pairs.index)


class Annotate:
    """A widget that asks one annotator about pairs; the last line of a cell shows it.

    pairs: a table with prompt, response, reference_response (`winrates.pairs`); the order in which
    they are shown is drawn by annotator. path: the file of answers, which several annotators may
    share. Goes on where it stopped. `box` holds the widgets, `buttons` the three answers, `back`
    the one that asks the last pair again, `progress` the bar.
    """

    def __init__(self, pairs: pd.DataFrame, path: str | Path, annotator: str, seed: int = 0):
        import ipywidgets

        for name in NEEDED:
            if name not in pairs:
                raise ValueError(f"Annotate: the pairs have no column {name!r}")
        if not annotator.strip():
            raise ValueError("Annotate: say who annotates (any name or number)")
        self.path, self.annotator, self.key = Path(path), annotator, f"{annotator} {seed}"
        distinct = {pair_id(pair): pair for pair in pairs.to_dict("records")}
        order = keyed_rng(self.key, "order").permutation(len(distinct))
        names = list(distinct)
        self.pairs = {names[i]: distinct[names[i]] for i in order}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stored = read_answers(self.path)
        mine = stored.loc[stored["annotator"] == annotator, "pair"]
        self.done = [pair for pair in mine if pair in self.pairs]

        self.prompt, self.note = ipywidgets.HTML(), ipywidgets.HTML()
        self.sides = [ipywidgets.HTML(layout={"width": "50%"}) for _ in "AB"]
        self.buttons = {}
        for answer, words in ANSWERS.items():
            button = ipywidgets.Button(description=words, tooltip=words)
            button.on_click(lambda _, answer=answer: self.answer(answer))
            self.buttons[answer] = button
        self.back = ipywidgets.Button(description="back", tooltip="answer the last pair again")
        self.back.on_click(lambda _: self.again())
        self.progress = ipywidgets.IntProgress(max=max(1, len(self.pairs)))
        self.box = ipywidgets.VBox([
            self.prompt, ipywidgets.HBox(self.sides),
            ipywidgets.HBox([*self.buttons.values(), self.back]),
            ipywidgets.HBox([self.progress, self.note]),
        ])  # fmt: skip
        self.show()

    def _repr_mimebundle_(self, **given: Any) -> Any:
        return self.box._repr_mimebundle_(**given)

    @property
    def current(self) -> str | None:
        """The id of the pair that is shown; None when all are answered."""
        answered = set(self.done)
        return next((pair for pair in self.pairs if pair not in answered), None)

    def flipped(self, pair: str) -> bool:
        """Whether the arm's response is shown as B."""
        return swapped(self.key, self.pairs[pair])

    def answer(self, answer: str) -> None:
        """Stores "A", "B" or "tie" for the pair shown, then shows the next."""
        pair = self.current
        if pair is None:
            return
        outcome = {"A": 1, "B": -1, "tie": 0}[answer] * (-1 if self.flipped(pair) else 1)
        row = {"annotator": self.annotator, "pair": pair, "answer": answer, "outcome": outcome}
        _append(self.path, json.dumps(row, ensure_ascii=False))
        self.done.append(pair)
        self.show()

    def again(self) -> None:
        """Shows the pair that was answered last; what is stored stays until it is replaced."""
        if self.done:
            pair = self.done.pop()
            self.pairs = {pair: self.pairs[pair], **self.pairs}
            self.show()

    def show(self) -> None:
        """Puts the current pair, or that all are answered, on the screen."""
        pair, total = self.current, len(self.pairs)
        self.progress.value = len(self.done)
        self.note.value = f"{len(self.done)} of {total}"
        self.back.disabled = not self.done
        for button in self.buttons.values():
            button.disabled = pair is None
        if pair is None:
            self.prompt.value = "<b>All pairs are answered. Thank you.</b>"
            for side in self.sides:
                side.value = ""
            return
        row = self.pairs[pair]
        shown = [row["response"], row["reference_response"]]
        shown = shown[::-1] if self.flipped(pair) else shown
        self.prompt.value = _text(row["prompt"])
        for side, name, text in zip(self.sides, "AB", shown, strict=True):
            side.value = f"<b>{name}</b>{_text(text)}"


def _text(text: str) -> str:
    """A text as it is, whatever it holds."""
    style = "white-space: pre-wrap; line-height: 1.4; padding: 0.4em"
    return f'<div style="{style}">{html.escape(str(text).strip())}</div>'


def _append(path: Path, line: str) -> None:
    """One whole line at the end of the file, on the disk before this returns. A half line that a
    killed process left is closed by being cut off."""
    with open(path, "a+b") as file:
        file.seek(0)
        kept = file.read()
        whole = kept.rfind(b"\n") + 1
        if whole < len(kept):
            file.truncate(whole)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
