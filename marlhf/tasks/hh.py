"""Dialogue (HH-RLHF, Sec. 4.1): multi-turn prompts, and comparisons of two replies.

Rows of two schemas, each told by its columns, in any mixture:
    Dahoas/full-hh-rlhf  prompt, chosen, rejected, and response (else chosen is the demonstration)
    Anthropic/hh-rlhf    chosen, rejected: whole dialogues, split at the last turn of the assistant
A prompt is turns, each after an empty line and a name ("Human:", "Assistant:"), and ends with the
name of the assistant; it is cut at its start, turn by turn. Dropped and counted: ties, empty
replies, replies that go on with further turns, and dialogues whose two prompts differ.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from marlhf.config import DataConfig
from marlhf.tasks import hh_twin
from marlhf.tasks.base import Item, Row, text_of
from marlhf.tasks.pairs import DEMONSTRATION, PAIR, Pairs
from marlhf.text import DataError, Example

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
REPLIES = ("chosen", "rejected")


class HH(Pairs):
    name = "hh"
    hub = "Dahoas/full-hh-rlhf"
    schemas = (PAIR, DEMONSTRATION, REPLIES)

    def schema(self, columns: Collection[str]) -> Sequence[str]:
        whole = "prompt" not in columns and any(column in columns for column in REPLIES)
        return REPLIES if whole else super().schema(columns)

    def twin(self, data: DataConfig) -> list[dict]:
        return hh_twin.rows(data.size, data.seed)

    def read(self, row: Row) -> Item | str:
        columns = row.data.keys()
        if "prompt" not in columns:
            dialogues = [text_of(row, row.data[name], name) for name in REPLIES]
            if bad := [n for n, text in zip(REPLIES, dialogues, strict=True) if not _turns(text)]:
                return _no_dialogue(row, bad[0])
            (prompt, chosen), (other, rejected) = map(split_dialogue, dialogues)
            if prompt != other:
                return "chosen and rejected have different prompts"
            found = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            row = row._replace(data={**row.data, **found})
        else:
            prompt = text_of(row, row.data["prompt"], "prompt")
            if not _turns(prompt) or not prompt.rstrip().endswith(ASSISTANT):
                return _no_dialogue(row, "prompt")
        replies = [row.data.get(name) for name in (*REPLIES, "response")]
        replies = [reply for reply in replies if isinstance(reply, str)]
        if not all(reply.strip() for reply in replies):
            return "empty reply"  # the published sets have some, which nobody need mend
        if any(HUMAN in reply or ASSISTANT in reply for reply in replies):
            return "reply goes on with further turns"
        return super().read(row)

    def true_score(self, example: Example, response: str, finished: bool) -> float | None:
        facts = hh_twin.read_dialogue(example.prompt.text)
        return None if facts is None else hh_twin.judge(facts, response, finished).score

    def best_score(self, example: Example) -> float | None:
        return None if hh_twin.read_dialogue(example.prompt.text) is None else hh_twin.BEST

    def has_truth(self, data: DataConfig) -> bool:
        return data.source == "embedded"


def _turns(text: str) -> bool:
    return text.startswith(HUMAN) and ASSISTANT in text


def _no_dialogue(row: Row, column: str) -> str:
    """The reason to drop a hub row; DataError for a row that somebody can mend."""
    if not row.strict:
        return "not a dialogue"
    raise DataError(
        f"{row.where}: {column} should be turns {HUMAN!r} ... {ASSISTANT!r}"
        f"{' and end with the latter' if column == 'prompt' else ''}, found "
        f"{row.data[column][:40]!r}; other prompts: data.task=pairs"
    )


def split_dialogue(text: str) -> tuple[str, str]:
    """A dialogue -> its prompt, up to the last "Assistant:" and with it, and the reply."""
    end = text.rindex(ASSISTANT) + len(ASSISTANT)
    return text[:end], text[end:]


task = HH()
