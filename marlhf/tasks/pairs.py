"""Preferences of any kind, from a plain file or hub set: no twin, no truth.

Columns: prompt with chosen and rejected (and response, the demonstration, else chosen is it), as in
Dahoas/full-hh-rlhf; or prompt with response alone, which has no reward model's part. Multi-turn
prompts are cut at their start, oldest turns first. extra {finished: [chosen, rejected]}, two
booleans, says which texts were broken off; without it both ended.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence

from marlhf.tasks.base import Item, Row, Task, normalised, text_of
from marlhf.text import DataError, Prompt

PAIR, DEMONSTRATION = ("prompt", "chosen", "rejected"), ("prompt", "response")
# What a prompt ends with and may not lose: the name of who answers, as in "\n\nAssistant:".
ENDING = re.compile(r"\s*\n[^\n]{1,30}:\s*$")


class Pairs(Task):
    name = "pairs"
    hub = "Dahoas/full-hh-rlhf"
    schemas: Sequence[Sequence[str]] = (PAIR, DEMONSTRATION)

    def schema(self, columns: Collection[str]) -> Sequence[str]:
        if "chosen" in columns or "rejected" in columns:
            return PAIR
        return DEMONSTRATION if all(column in columns for column in DEMONSTRATION) else ()

    def read(self, row: Row) -> Item | str:
        columns = row.data.keys()
        prompt = text_of(row, row.data["prompt"], "prompt")
        texts = {
            name: _response(prompt, text_of(row, row.data[name], name, empty=name == "response"))
            for name in ("chosen", "rejected", "response")
            if name in columns
        }
        key = normalised(prompt)
        name = str(row.data.get("id") or hashlib.sha256(key.encode()).hexdigest()[:12])
        if "chosen" not in texts:
            if not texts["response"]:
                text_of(row, None, "response")
            return Item(key, name, _prompt(prompt), texts["response"])
        if normalised(texts["chosen"]) == normalised(texts["rejected"]):
            return "tie"
        finished = _finished(row)
        demonstration = texts.get("response") or texts["chosen"]
        if demonstration == texts["chosen"] and finished and not finished[0]:
            demonstration = ""  # a text that was broken off is no example
        pair = (texts["chosen"], texts["rejected"], *finished)
        return Item(key, name, _prompt(prompt), demonstration, pair=pair)


def _finished(row: Row) -> tuple[bool, ...]:
    """Whether chosen and rejected ended, where the row says so; else ()."""
    extra = row.data.get("extra")
    finished = extra.get("finished") if isinstance(extra, dict) else None
    if finished is None:
        return ()
    if (
        not isinstance(finished, list)
        or len(finished) != 2
        or not all(isinstance(each, bool) for each in finished)
    ):
        raise DataError(
            f"{row.where}: extra.finished should be two booleans, of chosen and of rejected, not "
            f"{finished!r}"
        )
    return tuple(finished)


def _prompt(text: str) -> Prompt:
    ending = ENDING.search(text)
    end = ending.start() if ending and ending.start() else len(text)
    return Prompt("", text[:end], text[end:], cut="start")


def _response(prompt: str, text: str) -> str:
    """A response as it follows its prompt: with a space between, where neither brings one."""
    text = text.rstrip()
    return " " + text if text and not (prompt[-1].isspace() or text[0].isspace()) else text


task = Pairs()
