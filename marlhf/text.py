"""Text in, token ids out, and back: prompts that are cut to a budget, responses with their end
token, padding with an explicit mask.

Prompt and response are always encoded one by one and concatenated, in SFT, reward model and
sampling alike, so that the boundary between them is the same everywhere. Nothing here infers a
mask from a padding token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
# Encoded and decoded before a text so that tokenizers which add or strip a leading space leave
# the text itself alone.
ANCHOR = "\n"


class DataError(ValueError):
    """Something is wrong with the data: the message names file, row and the mend."""


@dataclass(frozen=True)
class Prompt:
    """A prompt of which only `body` may be cut: at its "end" (a post) or "start" (old turns)."""

    prefix: str
    body: str
    suffix: str
    cut: str = "end"

    @property
    def text(self) -> str:
        return self.prefix + self.body + self.suffix


@dataclass(frozen=True)
class Example:
    """A prompt with its demonstration (`response`, "" if there is none) and the row it is from."""

    id: str
    prompt: Prompt
    response: str
    row: dict = field(repr=False, compare=False)


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, the first preferred; `*_finished`: it ends by an end token."""

    id: str
    prompt: Prompt
    chosen: str
    rejected: str
    chosen_finished: bool = True
    rejected_finished: bool = True


def jsonl_lines(path: str | Path) -> list[tuple[int, dict]]:
    """The rows of a .jsonl file with their line numbers (from 1); blank lines are skipped.

    Raises DataError for a file that is not there, is not UTF-8, or has a line that is not a JSON
    object.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    rows = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{path} line {number}: malformed JSON ({error.msg} at column "
                        f"{error.colno}); a .jsonl file holds one JSON object a line"
                    ) from None
                if not isinstance(row, dict):
                    raise DataError(
                        f"{path} line {number}: expected a JSON object, found "
                        f"{type(row).__name__}; a .jsonl file holds one JSON object a line"
                    )
                rows.append((number, row))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    return rows


def read_jsonl(path: str | Path) -> list[dict]:
    """The rows of a .jsonl file; raises as `jsonl_lines`."""
    return [row for _, row in jsonl_lines(path)]


def load_tokenizer(
    name: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer by hub name or folder, with a padding token whatever it came with.

    A missing padding token becomes the end token: masks are explicit everywhere, so the id never
    matters. Raises ValueError where there is no tokenizer, or one with no end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(name), revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers raises OSError, ValueError, TypeError, ...
        reason = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"no tokenizer at {str(name)!r}: {reason[0] if reason else type(error).__name__}; give "
            f"a folder that holds tokenizer.json and tokenizer_config.json, or a hub name"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer at {str(name)!r} has no end token: set eos_token in its "
            f"tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab_size` entries (<pad>, <eos>, 256 bytes, merges).

    Deterministic in the texts; any text can be encoded and decodes to itself. Raises ValueError
    where the bytes alone do not fit.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 2:
        raise ValueError(
            f"a byte-level vocabulary needs at least {len(alphabet) + 2} entries, not {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, config) -> None:
    """Raises ValueError where the tokenizer has ids that the model's embedding does not."""
    size = config.get_text_config().vocab_size
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= size:
        raise ValueError(
            f"the tokenizer's largest id is {largest} ({token!r}) but the model's embedding has "
            f"{size} rows: take the tokenizer that belongs to the model"
        )


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerFast, budget: int) -> list[int]:
    """Token ids of the whole prompt, with the tokenizer's own specials at its start.

    A prompt of more than `budget` tokens has its body cut at the longest run of whole words that
    fits; a body cut at the start begins at a turn of a dialogue if one fits, else at a paragraph.
    Raises DataError for an empty prompt, and for one whose prefix and suffix alone do not fit.
    """
    if not prompt.text.strip():
        raise DataError("empty prompt: a prompt needs at least one character that is not a space")
    ids = _encode(prompt.text, tokenizer)
    if len(ids) <= budget:
        return ids
    bare = _encode(prompt.prefix + prompt.suffix, tokenizer)
    if len(bare) > budget:
        raise DataError(
            f"the prompt's fixed parts take {len(bare)} of {budget} tokens "
            f"({_shorten(prompt.prefix + prompt.suffix)!r}): raise data.prompt_tokens"
        )
    for kept in _cuts(prompt):
        if (ids := _longest(kept, prompt, tokenizer, budget)) is not None:
            return ids
    return bare


def _encode(text: str, tokenizer) -> list[int]:
    ids = tokenizer(text, split_special_tokens=True, verbose=False).input_ids
    # Some tokenizers close every text with their end token; a prompt goes on.
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids


def _cuts(prompt: Prompt) -> Iterable[list[str]]:
    """What may be left of the body, shortest first: whole paragraphs or words, else characters."""
    body = prompt.body
    if prompt.cut == "end":
        yield [body[: match.start()] for match in re.finditer(r"(?<=\S)\s+", body)]
        yield [body[:end] for end in range(1, len(body))]
    elif prompt.cut == "start":
        for boundary in (r"\n\n(?=\w+:)", r"\n\n"):  # a turn ("Human:"), a paragraph
            yield [body[match.start() :] for match in re.finditer(boundary, body)][::-1]
        yield [body[match.end() :] for match in re.finditer(r"\s+", body)][::-1]
        yield [body[start:] for start in range(len(body) - 1, 0, -1)]
    else:
        raise ValueError(f'a prompt is cut at its "end" or "start", not {prompt.cut!r}')


def _longest(kept: list[str], prompt: Prompt, tokenizer, budget: int) -> list[int] | None:
    """Ids of the longest body in `kept` (shortest first) that fits; None if none does."""
    best, low, high = None, 0, len(kept)
    while low < high:
        middle = (low + high) // 2
        ids = _encode(prompt.prefix + kept[middle] + prompt.suffix, tokenizer)
        if len(ids) <= budget:
            best, low = ids, middle + 1
        else:
            high = middle
    return best


def _shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def encode_response(
    text: str, tokenizer: PreTrainedTokenizerFast, budget: int, end: bool = True
) -> list[int]:
    """Token ids of a response, no specials, at most `budget`; the end token follows if `end`.

    A response that does not fit with its end token is cut at the budget and has none. A leading
    space stays the response's own, also with tokenizers that would add one.
    """
    if budget < 1:
        raise ValueError(f"a response needs a budget of at least 1 token, not {budget}")
    anchor = _anchor(tokenizer)
    ids = tokenizer(
        (ANCHOR if anchor else "") + text, add_special_tokens=False, split_special_tokens=True
    ).input_ids
    if ids[: len(anchor)] == list(anchor):
        ids = ids[len(anchor) :]
    else:  # the text's own beginning merged with the anchor (it starts with a line break)
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    if end and len(ids) < budget:
        return [*ids, tokenizer.eos_token_id]
    return ids[:budget]


@lru_cache(maxsize=16)
def _anchor(tokenizer) -> tuple[int, ...]:
    """Ids of ANCHOR for a tokenizer that puts a space before every text; () for others."""
    ids = tokenizer("a", add_special_tokens=False).input_ids
    adds = tokenizer.convert_ids_to_tokens(ids)[0].startswith(("▁", "Ġ"))
    return tuple(tokenizer(ANCHOR, add_special_tokens=False).input_ids) if adds else ()


def decode(ids: Sequence[int] | torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> str:
    """The text of response ids, special tokens skipped: the inverse of `encode_response`."""
    specials = set(tokenizer.all_special_ids)
    kept = [token for token in _integers(ids) if token not in specials]
    anchor = list(_anchor(tokenizer))
    text = tokenizer.decode(anchor + kept, clean_up_tokenization_spaces=False)
    return text[len(tokenizer.decode(anchor, clean_up_tokenization_spaces=False)) :]


def _integers(ids: Sequence[int] | torch.Tensor) -> list[int]:
    return ids.tolist() if isinstance(ids, torch.Tensor) else [int(token) for token in ids]


def left_pad(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of unequal length -> ids [B, P] int64 and mask [B, P] bool, valid at the right."""
    return _pad(rows, pad, left=True)


def right_pad(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Responses of unequal length -> ids [B, T] int64 and mask [B, T] bool, valid at the left."""
    return _pad(rows, pad, left=False)


def _pad(rows, pad: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        if len(row):
            where = slice(width - len(row), width) if left else slice(0, len(row))
            ids[index, where] = torch.as_tensor(row, dtype=torch.int64)
            mask[index, where] = True
    return ids, mask
