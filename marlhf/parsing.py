"""Termination by parsing: the constituents of each sentence are the macro actions (Sec. 3.2.1,
App. B.4).

`Constituency` asks a parser for the trees of the decoded responses and walks each tree depth first.
A parser is any callable `parser(texts) -> one list of Sentences a text`: `TwinParser`, the grammar
that generated a twin's texts, or `StanzaParser`, a trained parser of English.
"""

from __future__ import annotations

import codecs
import importlib
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from marlhf.grammars import ClauseParser
from marlhf.segment import _checked_mask, from_starts
from marlhf.tasks.webgpt_twin import MARKS

Node = int | tuple  # a constituency tree: a word by its number, or the tuple of a node's children


class Sentence(NamedTuple):
    """A sentence as a parser sees it: where each word starts in the text, in characters, and the
    tree over the words by their numbers; None where the parse failed."""

    starts: tuple[int, ...]
    tree: Node | None


Parser = Callable[[Sequence[str]], Sequence[Sequence[Sentence]]]


class Constituency:
    """Macro actions are constituents (App. B.4): depth first through a sentence's tree, a node of
    fewer than `cutoff` leaves, counted in policy tokens, is one macro action; a node of a single
    token joins the macro action before it, so that no punctuation stands alone; of any other node
    the children are looked at in turn. A word of `cutoff` tokens or more is one macro action.

    Where a sentence has no parse its tokens are macro actions of their own, as in token PPO.
    `sentences` and `fallbacks` count the sentences seen and those without a parse. A token belongs
    to the word of its first character that is no space (so a leading space goes with its word, and
    a token of two words with the first); one after the last word to that; special tokens join what
    is before them.

    Called as every segmenter (`marlhf.segment`), on the host: tokens [B, T] are read there. Raises
    ValueError for a tokenizer that is neither byte-level BPE nor SentencePiece.
    """

    def __init__(self, tokenizer: Any, parser: Parser, cutoff: int = 5):
        if cutoff < 2:
            raise ValueError(f"cutoff: must be at least 2 tokens, got {cutoff}")
        self.parser, self.cutoff = parser, cutoff
        self.sentences = self.fallbacks = 0
        self._bytes = token_bytes(tokenizer)

    def __call__(self, tokens, mask, *, ref_logprobs=None, generator=None) -> Tensor:
        mask = _checked_mask(tokens, mask)
        host, valid = tokens.cpu(), mask.cpu()
        rows = [host[row][valid[row]].tolist() for row in range(len(host))]
        read = [self._read(row) for row in rows]
        parses = self.parser([text for text, _ in read])
        starts = torch.zeros_like(valid)
        for row, ((_, places), sentences) in enumerate(zip(read, parses, strict=True)):
            flags = torch.tensor(self._starts(places, sentences), dtype=torch.bool)
            starts[row, valid[row]] = flags
        return from_starts(starts.to(mask.device), mask)

    def _read(self, ids: list[int]) -> tuple[str, list[int | None]]:
        """A response's text, and for each token the place of its first character that is no space;
        None for a special token."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text, places = "", []
        for token in ids:
            found = self._bytes[token]
            if found is None:
                places.append(None)
                continue
            piece = decoder.decode(found)  # a character counts where its last byte comes
            word = piece.lstrip()
            places.append(len(text) + len(piece) - len(word))
            text += piece
        return text, places

    def _starts(self, places: list[int | None], sentences: Sequence[Sentence]) -> list[bool]:
        """Whether each of a row's tokens starts a macro action."""
        self.sentences += len(sentences)
        self.fallbacks += sum(sentence.tree is None for sentence in sentences)
        words = [start for sentence in sentences for start in sentence.starts]
        if not words:
            return [place is not None for place in places]
        counts = [0] * len(words)  # tokens of each word; places only grow
        for place in places:
            if place is not None:
                counts[max(bisect_right(words, place) - 1, 0)] += 1
        flags, first = [], 0
        for starts, tree in sentences:
            own = tuple(counts[first : first + len(starts)])
            flags += [True] * sum(own) if tree is None else macro_starts(tree, own, self.cutoff)
            first += len(starts)
        ordinary = iter(flags)
        return [place is not None and next(ordinary) for place in places]


@lru_cache(maxsize=65536)
def macro_starts(tree: Node, counts: tuple[int, ...], cutoff: int) -> tuple[bool, ...]:
    """Whether each token of a sentence starts a macro action; counts: the tokens of each word."""
    flags: list[bool] = []

    def visit(node: Node) -> None:
        """Flags the node's tokens."""
        size = tokens(node)
        if isinstance(node, int) or size < cutoff:
            flags.extend(size > 1 and i == 0 for i in range(size))
        else:
            for child in node:
                visit(child)

    def tokens(node: Node) -> int:
        return counts[node] if isinstance(node, int) else sum(map(tokens, node))

    visit(tree)
    return tuple(flags)


def nested(tree: Any) -> tuple[Node, int]:
    """A tree of nltk as nested tuples over its leaves' numbers, and how many leaves there are.
    Stanza's trees, whose `children` are an attribute, and leaves have none, are read alike."""
    count = 0

    def walk(node: Any) -> Node:
        nonlocal count
        children = getattr(node, "children", () if isinstance(node, str) else node)
        if not children:
            count += 1
            return count - 1
        return tuple(walk(child) for child in children)

    return walk(tree), count


@lru_cache(maxsize=4)
def _gpt2_bytes() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {char: byte for byte, char in bytes_to_unicode().items()}


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The bytes that each token of a vocabulary writes, its space included; None for special ones.

    Raises ValueError for a vocabulary whose pieces mark no spaces (neither Ġ nor ▁).
    """
    vocab, special = tokenizer.get_vocab(), set(tokenizer.all_special_ids)
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    gpt2 = any(piece.startswith("Ġ") for piece in vocab)
    if not gpt2 and not any("▁" in piece for piece in vocab):
        raise ValueError(
            "termination by parsing reads byte-level BPE and SentencePiece tokenizers; the pieces "
            "of this one mark no spaces: choose another ppo.macro.termination"
        )
    found: list[bytes | None] = [b""] * (max(vocab.values()) + 1)
    for piece, token in vocab.items():
        if token in special:
            found[token] = None
        elif gpt2 and piece not in added:
            found[token] = bytes(_gpt2_bytes()[char] for char in piece)
        elif not gpt2 and (byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece)):
            found[token] = bytes.fromhex(byte[1])
        else:
            found[token] = piece.replace("▁", " ").encode()
    return found


# ---------------------------------------------------------------- parsers


class TwinParser:
    """Parses a twin's texts with the grammar that generated them (`marlhf.grammars`).

    What it calls a sentence is a clause with the joint after it (and, a comma, a full stop): a
    written sentence is a row of these. A clause that the grammar does not have is one without a
    parse. Raises ValueError for a task whose twin has no grammar.
    """

    name = "twin"
    _word = re.compile(rf"[^\s,.{MARKS}]+|[,.{MARKS}]")
    _after = frozenset(",." + MARKS)  # a clause ends before these and before "and"

    def __init__(self, task: str):
        self._clauses = ClauseParser(task)
        self._tree = lru_cache(maxsize=65536)(self._parse)

    def __call__(self, texts: Sequence[str]) -> list[list[Sentence]]:
        return [self._sentences(text) for text in texts]

    def _sentences(self, text: str) -> list[Sentence]:
        found, words, starts = [], [], []
        for match in self._word.finditer(text):
            words.append(match[0])
            starts.append(match.start())
            if match[0] in (",", ".", "and"):
                found.append(Sentence(tuple(starts), self._tree(tuple(words))))
                words, starts = [], []
        if words:
            found.append(Sentence(tuple(starts), self._tree(tuple(words))))
        return found

    def _parse(self, words: tuple[str, ...]) -> Node | None:
        """The tree of a clause and what follows it, each of that a child of the root."""
        end = len(words) - (words[-1] in (",", ".", "and"))
        end -= end > 0 and words[end - 1] in self._after
        tree = self._clauses(words[:end])
        return None if tree is None else (nested(tree)[0], *range(end, len(words)))


class StanzaParser:
    """Stanza's constituency parser of English. `pipeline`: one that is loaded already.

    Raises ValueError, with the command that mends it, where the package or its models are missing.
    """

    name = "stanza"
    PROCESSORS = "tokenize,pos,constituency"

    def __init__(self, pipeline: Any = None):
        self._pipeline = pipeline or self._load()

    def _load(self) -> Any:
        try:
            stanza = importlib.import_module("stanza")
        except ImportError:
            raise ValueError(
                "ppo.macro.parser=stanza needs stanza: python -m pip install 'marlhf[parsing]'"
            ) from None
        try:
            return stanza.Pipeline(
                "en", processors=self.PROCESSORS, download_method=None, verbose=False
            )
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            command = f"import stanza; stanza.download('en', processors='{self.PROCESSORS}')"
            raise ValueError(
                f"stanza has no models of English here ({reason}): get them with "
                f'python -c "{command}"'
            ) from None

    def __call__(self, texts: Sequence[str]) -> list[list[Sentence]]:
        documents = iter(self._pipeline.bulk_process([text for text in texts if text.strip()]))
        return [self._sentences(next(documents)) if text.strip() else [] for text in texts]

    def _sentences(self, document: Any) -> list[Sentence]:
        found = []
        for sentence in document.sentences:
            starts = []
            for token in sentence.tokens:
                for word in token.words:
                    # a word inside a contraction may have no place of its own
                    start = getattr(word, "start_char", None)
                    starts.append(token.start_char if start is None else start)
            tree, leaves = (None, 0)
            if sentence.constituency is not None:
                tree, leaves = nested(sentence.constituency)
            found.append(Sentence(tuple(starts), tree if leaves == len(starts) else None))
        return found


def make_parser(name: str, task: str) -> Parser:
    """The parser that ppo.macro.parser names; `task` says which twin's grammar."""
    return {"twin": lambda: TwinParser(task), "stanza": StanzaParser}[name]()
