"""TL;DR summarization (Sec. 4.1): posts, human summaries, and comparisons of two summaries.

Rows of three schemas, each told by its columns, in any mixture:
    comparisons  info {post, title, subreddit}, summaries [{text, policy}, {text, policy}], choice
    axis         info, summary {text, policy, axes}
    posts        subreddit, title, post, summary
The first two are those of openai/summarize_from_feedback. A demonstration is the human summary (of
a posts row, else the one of policy "ref"), else the chosen one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

from marlhf.config import DataConfig
from marlhf.tasks import tldr_twin
from marlhf.tasks.base import Item, Row, Task, need_columns, normalised, text_of
from marlhf.text import DataError, Example, Prompt

POST = ("subreddit", "title", "post")
COMPARISONS, AXIS, POSTS = ("info", "summaries", "choice"), ("info", "summary"), (*POST, "summary")
HUMAN, REFERENCE, CHOSEN = range(3)  # ranks of a demonstration


class Tldr(Task):
    name = "tldr"
    hub = "openai/summarize_from_feedback"
    folders = ("comparisons", "axis")
    schemas = (COMPARISONS, AXIS, POSTS)

    def twin(self, data: DataConfig) -> list[dict]:
        return tldr_twin.rows(data.size, data.seed)

    def schema(self, columns: Collection[str]) -> Sequence[str]:
        if "summaries" in columns:
            return COMPARISONS
        if "info" in columns:
            return AXIS
        return POSTS if any(column in columns for column in POSTS) else ()

    def read(self, row: Row) -> Item | str:
        schema = self.schema(row.data)
        if schema == POSTS:
            text = _summary(row, row.data["summary"], "summary")
            return _item(row, row.data, text, HUMAN)
        info = row.data["info"]
        if not isinstance(info, dict):
            raise DataError(f"{row.where}: info should be an object with post, title, subreddit")
        if not info.get("post") and info.get("article"):
            return "news article"  # a part of the hub set is about CNN/DM, which is not this task
        return (_comparison if schema == COMPARISONS else _axis)(row, info)

    def true_score(self, example: Example, response: str, finished: bool) -> float | None:
        facts = tldr_twin.read_post(example.prompt.body)
        return None if facts is None else tldr_twin.judge(facts, response, finished).score

    def best_score(self, example: Example) -> float | None:
        return None if tldr_twin.read_post(example.prompt.body) is None else tldr_twin.BEST

    def has_truth(self, data: DataConfig) -> bool:
        return data.source == "embedded"


def _item(row: Row, info: dict, demonstration: str, rank: int, pair=None) -> Item:
    need_columns(Row(f"{row.where}: info", info), POST)
    post = text_of(row, info["post"], "post").strip()
    prompt = Prompt(
        f"SUBREDDIT: r/{text_of(row, info['subreddit'], 'subreddit', empty=True).strip()}\n"
        f"TITLE: {text_of(row, info['title'], 'title', empty=True).strip()}\nPOST: ",
        post,
        "\nTL;DR:",
    )
    key = normalised(post)
    name = str(info.get("id") or hashlib.sha256(key.encode()).hexdigest()[:12])
    return Item(key, name, prompt, demonstration, rank, pair)


def _summary(row: Row, text: object, column: str) -> str:
    """A summary as a response: after one space, as it follows the prompt's last colon."""
    return " " + text_of(row, text, column).strip()


def _comparison(row: Row, info: dict) -> Item | str:
    summaries, choice = row.data["summaries"], row.data["choice"]
    if (
        not isinstance(summaries, list)
        or len(summaries) != 2
        or not all(isinstance(summary, dict) for summary in summaries)
    ):
        raise DataError(f"{row.where}: summaries should be a list of two objects with a text")
    texts = [
        _summary(row, summary.get("text"), f"summaries[{i}].text")
        for i, summary in enumerate(summaries)
    ]
    if choice is None:
        return "tie"
    if choice not in (0, 1) or isinstance(choice, bool):
        raise DataError(f"{row.where}: choice should be 0, 1, or null for a tie, not {choice!r}")
    extra = row.data.get("extra")
    finished = (extra.get("finished") if isinstance(extra, dict) else None) or (True, True)
    pair = (texts[choice], texts[1 - choice], finished[choice], finished[1 - choice])
    human = [i for i in (0, 1) if summaries[i].get("policy") == "ref"]
    if human:
        return _item(row, info, texts[human[0]], REFERENCE, pair)
    return _item(row, info, texts[choice] if finished[choice] else "", CHOSEN, pair)


def _axis(row: Row, info: dict) -> Item:
    summary = row.data["summary"]
    if not isinstance(summary, dict):
        raise DataError(f"{row.where}: summary should be an object with text and axes")
    human = summary.get("policy") == "ref"
    text = _summary(row, summary.get("text"), "summary.text") if human else ""
    return _item(row, info, text, REFERENCE)


task = Tldr()
