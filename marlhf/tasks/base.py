"""What every task shares: rows from the twin, a file, a folder or the hub; the split; the parts.

A task says three things: where its hub set is, what its embedded twin generates, and what one row
means (`read`). Everything else is the same for all of them, so that twin, local and hub rows go
through the same code. A new task is one file: see marlhf/tasks/pairs.py.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from marlhf.config import DataConfig
from marlhf.text import DataError, Example, Pair, Prompt, jsonl_lines

PARQUET = "refs/convert/parquet"  # the hub's own Parquet conversion of a set, scripts included
PARTS = ("sft", "rm", "ppo")
TABLES = (".parquet", ".csv")  # refused, with how to make .jsonl of them


@dataclass
class TaskData:
    """The parts of a task's rows; no prompt is in two of sft, rm, ppo and the held-out two.

    dropped: rows that were left out, counted by the reason. fingerprint: sha256 of what is used.
    """

    sft: list[Example]
    rm: list[Pair]
    ppo: list[Example]
    valid: list[Example]
    valid_pairs: list[Pair]
    dropped: dict[str, int]
    fingerprint: str
    source: str = "embedded"

    def require(self, part: str) -> list[Example] | list[Pair]:
        """The rows of a part; raises DataError where it has none."""
        if rows := getattr(self, part):
            return rows
        needs = {
            "sft": "demonstrations: rows with a summary or response",
            "rm": "comparisons: rows with a preferred and a rejected response",
            "valid_pairs": "comparisons on held-out prompts: more rows with two responses",
        }.get(part, "more prompts")
        raise DataError(f"{self.source} has nothing for the part {part!r}: it needs {needs}")


class Row(NamedTuple):
    """A row, where it stands (for messages), its source's split, and whether it is the user's."""

    where: str
    data: dict
    split: str = ""
    strict: bool = True  # a fault in a user's own row is an error, in a hub row it is counted


@dataclass
class Item:
    """What one row says about one prompt.

    key: rows of one key go to the same part. rank: of several demonstrations of a key the one of
    the lowest rank is taken, of equals the first. pair: (chosen, rejected) or with two booleans
    more, whether each was finished.
    """

    key: str
    id: str
    prompt: Prompt
    demonstration: str = ""
    rank: int = 0
    pair: tuple | None = None


@dataclass
class _Entry:
    id: str
    prompt: Prompt
    row: dict
    demonstration: str = ""
    rank: float = float("inf")
    pairs: list[tuple] = field(default_factory=list)
    held: bool = False


class EmptyText(DataError):
    """A row without text where text is needed."""


class UnreadTable(DataError):
    """A table that is no .jsonl file; columns: its columns, None where they cannot be read."""

    def __init__(self, message: str, columns: list[str] | None):
        super().__init__(message)
        self.columns = columns


class Task:
    """A task; subclasses set the class attributes and `read`, and `true_score` where it exists."""

    name = ""
    hub = ""  # the hub set that source="hub" reads
    folders: Sequence[str] = ()  # its configurations, where only some are wanted
    held_out = 0.1  # the largest share of the prompts that is held out
    # Columns of a row: all those of one of these. Other columns are left alone.
    schemas: Sequence[Sequence[str]] = ()

    def twin(self, data: DataConfig) -> list[dict]:
        """Rows of the embedded twin, in the hub set's own columns."""
        raise DataError(f"the task {self.name!r} has no embedded twin: set data.source to a file")

    def schema(self, columns: Collection[str]) -> Sequence[str]:
        """The one of `schemas` by which a row of these columns is read, whether it has all of it or
        not; () where that cannot be said."""
        return self.schemas[0] if len(self.schemas) == 1 else ()

    def takes(self, columns: Collection[str]) -> bool:
        """Whether a row of these columns has those of a schema."""
        wanted = self.schema(columns)
        return bool(wanted) and all(column in columns for column in wanted)

    def check_columns(self, where: str, columns: Collection[str]) -> None:
        """Raises DataError that names the columns missing, wanted and found, and the mend."""
        if not self.schemas or self.takes(columns):
            return
        wanted = self.schema(columns)
        missing = [column for column in wanted if column not in columns]
        if len(missing) < len(wanted):
            fault = f"missing column {', '.join(missing)}; wanted {', '.join(wanted)}"
        else:
            fault = f"missing columns; wanted {self._wanted()}"
        raise DataError(
            f"{where}: {fault}; found {', '.join(columns) or 'none'}. {self._mend(columns)}"
        )

    def _wanted(self) -> str:
        return "; or ".join(map(", ".join, self.schemas))

    def _mend(self, columns: Collection[str]) -> str:
        from marlhf.tasks import get_task, task_names  # here: that module imports the tasks

        others = [name for name in task_names() if name != self.name]
        if fitting := [name for name in others if get_task(name).takes(columns)]:
            choices = " or ".join(f"data.task={name}" for name in fitting)
            return f"These are the columns of {' and '.join(fitting)}: set {choices}"
        return f"Rename the columns to those that the task {self.name} reads (data/README.md)"

    def read(self, row: Row) -> Item | str:
        """What a row with the columns of a schema says, or the reason for which it is dropped;
        raises DataError."""
        raise NotImplementedError

    def true_score(self, example: Example, response: str, finished: bool) -> float | None:
        """The score by which the twin's preferences were made; None where there is no truth."""
        return None

    def true_scores(
        self, examples: Sequence[Example], responses: Sequence[str], finished: Sequence[bool]
    ) -> list[float | None]:
        """`true_score` of a batch; a task that judges many together more cheaply overrides it."""
        return [
            self.true_score(example, response, bool(end))
            for example, response, end in zip(examples, responses, finished, strict=True)
        ]

    def best_score(self, example: Example) -> float | None:
        """The true score of the best possible response; None where there is no truth."""
        return None

    def has_truth(self, data: DataConfig) -> bool:
        return False

    def labels(self, example: Example) -> dict[str, str]:
        """What tables of responses are split by, such as {"difficulty": "interview"}."""
        return {}

    def facts(self, data: DataConfig) -> dict[str, str]:
        """What a run's summary says of this machine, and no number depends on. Called before the
        run computes: what the task cannot do here is raised now."""
        return {}

    def rows(self, data: DataConfig) -> list[Row]:
        """The rows of the configured source; raises DataError where there are none, or where one
        has not the columns that the task reads."""
        if data.source == "embedded":
            return [Row(f"twin row {i}", row, "") for i, row in enumerate(self.twin(data))]
        try:
            rows = source_rows(data, self.hub, self.folders)
        except UnreadTable as table:
            if table.columns is not None:
                self.check_columns(f"{table} Its columns are not the task's either", table.columns)
            raise
        for row in rows:
            self.check_columns(row.where, row.data)
        return rows

    def load(self, data: DataConfig) -> TaskData:
        """Reads the source, splits it by prompt (data.split, shuffled with data.seed).

        Held-out prompts are set aside first: from the source's own validation or test rows where
        it has training rows beside them, else `data.valid` prompts, of few at most `held_out`.
        Deterministic, and independent of the order of rows in which prompts first appear.
        """
        dropped: Counter[str] = Counter()
        entries = _gather(self.rows(data), self.read, dropped)
        if not entries:
            raise DataError(f"{data.source}: no rows to use; dropped: {dict(dropped) or 'none'}")
        keys = split_keys(entries, data, self.held_out)
        parts = {part: [entries[key] for key in keys[part]] for part in keys}
        examples = {part: [_example(entry) for entry in parts[part]] for part in parts}
        sft = [example for example in examples["sft"] if example.response]
        if missing := len(examples["sft"]) - len(sft):
            dropped["no demonstration"] += missing
        used = {
            "sft": sft,
            "rm": [pair for entry in parts["rm"] for pair in _pairs(entry)],
            "ppo": examples["ppo"],
            "valid": examples["valid"],
            "valid_pairs": [pair for entry in parts["valid"] for pair in _pairs(entry)],
        }
        return TaskData(
            **used, dropped=dict(dropped), fingerprint=fingerprint(used), source=data.source
        )


def _gather(rows: Iterable[Row], read, dropped: Counter[str]) -> dict[str, _Entry]:
    """Rows by key, in the order of first appearance."""
    entries: dict[str, _Entry] = {}
    splits: set[str] = set()
    ids: set[str] = set()
    for row in rows:
        splits.add(row.split)
        try:
            item = read(row)
        except EmptyText:
            if row.strict:
                raise
            item = "empty text"
        if isinstance(item, str):
            dropped[item] += 1
            continue
        if (entry := entries.get(item.key)) is None:
            name, copy = item.id, 1
            while name in ids:  # one id for one prompt: randomness and samples are keyed by it
                copy += 1
                name = f"{item.id}~{copy}"
            ids.add(name)
            entry = entries[item.key] = _Entry(name, item.prompt, row.data)
        if item.demonstration and item.rank < entry.rank:
            entry.demonstration, entry.rank = item.demonstration, item.rank
        if item.pair:
            entry.pairs.append(item.pair)
        entry.held |= row.split.startswith(("valid", "test"))
    if not any(split.startswith("train") for split in splits):
        for entry in entries.values():  # a source of held-out rows alone is split as any other
            entry.held = False
    return entries


def split_keys(
    entries: dict[str, _Entry], data: DataConfig, held_out: float
) -> dict[str, list[str]]:
    """Keys of each part. A key's place in the shuffle depends on data.seed and itself only."""
    order = sorted(entries, key=lambda key: hashlib.sha256(f"{data.seed}:{key}".encode()).digest())
    held = [key for key in order if entries[key].held]
    if held:
        free = [key for key in order if not entries[key].held]
        valid = held[: data.valid]
    else:
        count = min(data.valid, max(1, int(len(order) * held_out)))
        valid, free = order[:count], order[count:]
    parts, start, total = {"valid": valid}, 0, 0.0
    for part, share in zip(PARTS, data.split, strict=True):
        total += share
        end = round(total * len(free))
        parts[part] = free[start:end]
        start = end
    return parts


def _example(entry: _Entry) -> Example:
    return Example(entry.id, entry.prompt, entry.demonstration, entry.row)


def _pairs(entry: _Entry) -> list[Pair]:
    return [
        Pair(f"{entry.id}#{number}", entry.prompt, *pair) for number, pair in enumerate(entry.pairs)
    ]


def fingerprint(parts: dict[str, list[Example] | list[Pair]]) -> str:
    """sha256 over the texts of every part in order: whatever of the rows can change a number."""
    digest = hashlib.sha256()
    for part, rows in parts.items():
        digest.update(f"{part}\0{len(rows)}\0".encode())
        for row in rows:
            prompt = (row.prompt.prefix, row.prompt.body, row.prompt.suffix, row.prompt.cut)
            texts = (
                (row.response,)
                if isinstance(row, Example)
                else (row.chosen, row.rejected, row.chosen_finished, row.rejected_finished)
            )
            digest.update(repr((row.id, prompt, texts)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


# ---------------------------------------------------------------- rows of a source


def source_rows(data: DataConfig, hub: str = "", folders: Sequence[str] = ()) -> list[Row]:
    """Rows of "hub", of a hub set by name, of a .jsonl file, or of all of a folder's .jsonl files.

    Raises DataError for a source that is none of them, cannot be read, or has no rows.
    """
    path = Path(data.source).expanduser()
    if path.exists():
        rows = _local_rows(path)
    elif data.source == "hub" and hub:
        rows = hub_rows(hub, data.revision, folders)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", data.source) and path.suffix != ".jsonl":
        rows = hub_rows(data.source, data.revision, folders if data.source == hub else ())
    else:
        near = difflib.get_close_matches(data.source, ["embedded", "hub"], 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(
            f"unknown source {data.source!r}: {hint}data.source is embedded, hub, a hub name "
            f"(owner/name), or the path of a .jsonl file or of a folder of them"
        )
    if not rows:
        raise DataError(f"{data.source}: no rows; a .jsonl file holds one JSON object a line")
    return rows


def _local_rows(path: Path) -> list[Row]:
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        for table in sorted(path.iterdir()):
            _refuse_table(table)
        raise DataError(f"{path}: no .jsonl file in this folder")
    return [
        Row(f"{file} line {line}", row, str(row.get("split") or ""))
        for file in files
        for line, row in _lines(file)
    ]


def _lines(file: Path) -> list[tuple[int, dict]]:
    try:
        return jsonl_lines(file)
    except DataError:
        _refuse_table(file)
        raise


def _refuse_table(path: Path) -> None:
    """Raises UnreadTable for a file of TABLES: its columns, and how to make .jsonl of it."""
    if path.suffix not in TABLES:
        return
    columns: list[str] | None
    try:
        import pandas  # imported late, as datasets

        table = (
            pandas.read_csv(path, nrows=0) if path.suffix == ".csv" else pandas.read_parquet(path)
        )
        columns = list(table.columns)
    except Exception:  # the errors have several bases; a broken table is refused as any other
        columns = None
    reader = f"pandas.read_{path.suffix[1:]}({str(path)!r})"
    writer = f"to_json({str(path.with_suffix('.jsonl'))!r}, orient='records', lines=True)"
    raise UnreadTable(
        f"{path}: only .jsonl files are read, no {path.suffix}. Make one of it: "
        f'python -c "import pandas; {reader}.{writer}".',
        columns,
    )


def hub_rows(name: str, revision: str | None = None, folders: Sequence[str] = ()) -> list[Row]:
    """Rows of a hub set, by default of its Parquet conversion (datasets runs no loading scripts).

    folders: the configurations to read, folders in the conversion; () for everything. Raises
    DataError where the set cannot be read.
    """
    from datasets import load_dataset  # imported late: it takes seconds, and most runs need it not

    revision, rows = revision or PARQUET, []
    for folder in folders or (None,):
        try:
            tables = load_dataset(name, data_dir=folder, revision=revision)
        except Exception as error:  # datasets raises OSError, ValueError and its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"cannot read the hub set {name!r} at revision {revision!r}: {reason}. "
                f"{_whose_hub_set(name, folders)}Without a "
                f"network, save its rows as .jsonl and set data.source to the file or folder "
                f"(data/README.md says how)"
            ) from error
        for split, table in tables.items():
            label = "/".join(filter(None, (name, folder, split)))
            rows += [
                Row(f"{label} row {i}", row, str(row.get("split") or split), strict=False)
                for i, row in enumerate(table)
            ]
    return rows


def _whose_hub_set(name: str, folders: Sequence[str]) -> str:
    """A sentence where a set was not read by the configurations of the task whose it is: their
    columns differ, and read together they fail."""
    from marlhf.tasks import get_task, task_names  # here: that module imports the tasks

    for task in map(get_task, task_names()):
        if task.hub == name and tuple(task.folders) != tuple(folders):
            return f"Its columns are those of {task.name}: set data.task={task.name}. "
    return ""


# ---------------------------------------------------------------- columns of a row


def need_columns(row: Row, wanted: Sequence[str]) -> None:
    """Raises DataError that names the columns missing, wanted and found."""
    if missing := [column for column in wanted if column not in row.data]:
        raise DataError(
            f"{row.where}: missing column {', '.join(missing)}; wanted {', '.join(wanted)}; "
            f"found {', '.join(row.data) or 'none'}"
        )


def text_of(row: Row, value: object, column: str, empty: bool = False) -> str:
    """A column's text; raises DataError where it is not text, or is empty and may not be."""
    if value is None or (isinstance(value, str) and not value.strip()):
        if empty:
            return ""
        raise EmptyText(
            f"{row.where}: {column} is empty; give it text or take the row out of the file"
        )
    if not isinstance(value, str):
        raise DataError(f"{row.where}: {column} should be text, found {type(value).__name__}")
    return value


def normalised(text: str) -> str:
    """Text as a key: case and white space do not make two prompts of one."""
    return " ".join(text.split()).lower()
