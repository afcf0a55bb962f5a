"""Long-form question answering (Sec. 4.1): questions, answers, and comparisons of two answers.

Rows of openai/webgpt_comparisons, a comparison each: question {dataset, id, full_text}, and for
either answer quotes_i {title, extract}, answer_i, tokens_i {prefix, completion}, score_i (of the
two the higher is preferred; equal scores are a tie). A question may also be plain text. The
demonstration is a preferred answer. The quotes are what the answer's writer had found: they are
no part of the prompt, unless the question's text holds them.
"""

from __future__ import annotations

import hashlib
import math

from marlhf.config import DataConfig
from marlhf.tasks import webgpt_twin
from marlhf.tasks.base import Item, Row, Task, normalised, text_of
from marlhf.text import DataError, Example, Prompt

COLUMNS = ("question", "answer_0", "score_0", "answer_1", "score_1")


class Webgpt(Task):
    name = "webgpt"
    hub = "openai/webgpt_comparisons"
    schemas = (COLUMNS,)
    held_out = 0.05  # the paper's share; the set has no validation rows of its own

    def twin(self, data: DataConfig) -> list[dict]:
        return webgpt_twin.rows(data.size, data.seed)

    def read(self, row: Row) -> Item | str:
        question, name, dataset = _question(row)
        scores = [_score(row, f"score_{i}") for i in (0, 1)]
        answers = [
            " " + text_of(row, row.data[f"answer_{i}"], f"answer_{i}").strip() for i in (0, 1)
        ]
        if None in scores:
            return "no score"
        if scores[0] == scores[1]:
            return "tie"
        if normalised(answers[0]) == normalised(answers[1]):
            return "equal answers"
        key = normalised(question)
        best = int(scores[1] > scores[0])
        # only the twin's answers are cut off, and only its tokens say so
        ends = [dataset != webgpt_twin.DATASET or _ends(row, f"tokens_{i}") for i in (0, 1)]
        return Item(
            key,
            name or hashlib.sha256(key.encode()).hexdigest()[:12],
            Prompt("Human: ", question, "\n\nAssistant:"),
            answers[best] if ends[best] else "",
            pair=(answers[best], answers[1 - best], ends[best], ends[1 - best]),
        )

    def true_score(self, example: Example, response: str, finished: bool) -> float | None:
        facts = webgpt_twin.read_question(example.prompt.body)
        return None if facts is None else webgpt_twin.judge(facts, response, finished).score

    def best_score(self, example: Example) -> float | None:
        return None if webgpt_twin.read_question(example.prompt.body) is None else webgpt_twin.BEST

    def has_truth(self, data: DataConfig) -> bool:
        return data.source == "embedded"


def _question(row: Row) -> tuple[str, str, str]:
    """The question's text, its id and its data set, the last two "" where there are none."""
    question = row.data["question"]
    if not isinstance(question, dict):
        return text_of(row, question, "question").strip(), str(row.data.get("id") or ""), ""
    if "full_text" not in question:
        raise DataError(
            f"{row.where}: question should be text, or an object with dataset, id, full_text; "
            f"found {', '.join(question) or 'none'}"
        )
    text = text_of(row, question["full_text"], "question.full_text").strip()
    return text, str(question.get("id") or ""), str(question.get("dataset") or "")


def _score(row: Row, column: str) -> float | None:
    value = row.data[column]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{row.where}: {column} should be a number, or null, not {value!r}")
    return float(value)


def _ends(row: Row, column: str) -> bool:
    return (row.data.get(column) or {}).get("completion") == [webgpt_twin.END]


task = Webgpt()
