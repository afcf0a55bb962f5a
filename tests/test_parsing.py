"""Termination by parsing: trees to macro actions, words to tokens, the twins' grammars."""

from types import SimpleNamespace

import pytest
import torch
from nltk import Tree
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from marlhf import segment
from marlhf.grammars import ClauseParser, treebank
from marlhf.parsing import (
    Constituency,
    Sentence,
    StanzaParser,
    TwinParser,
    macro_starts,
    make_parser,
    nested,
)
from marlhf.segment import check_segments
from marlhf.tasks import hh_twin, tldr_twin, webgpt_twin

TASKS = ("tldr", "hh", "webgpt")


def tokenizer(*pieces):
    """Byte-level BPE of these pieces (Ġ for a space) and of all bytes, with an end token."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab = {piece: i for i, piece in enumerate(["<eos>", *sorted(alphabet), *pieces])}
    made = Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def batch(tokenizer, *rows):
    """Rows of pieces as tokens and mask [B, T], right padded."""
    vocab, longest = tokenizer.get_vocab(), max(map(len, rows))
    ids = [[vocab[piece] for piece in row] + [0] * (longest - len(row)) for row in rows]
    mask = [[i < len(row) for i in range(longest)] for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def whole(tree):
    """A parser that sees every text as one sentence of words between spaces, with this tree."""

    def parse(texts):
        found = []
        for text in texts:
            starts = [i for i, c in enumerate(text) if c != " " and (i == 0 or text[i - 1] == " ")]
            found.append([Sentence(tuple(starts), tree)])
        return found

    return parse


# Trees to macro actions


@pytest.mark.parametrize(
    "tree, counts, cutoff, starts",
    [
        # four tokens, fewer than five: one macro action
        ((0, (1, 2)), (1, 1, 2), 5, "1000"),
        # five are not: "0" has one token and joins what was before, (1, 2) is one
        ((0, (1, 2)), (1, 2, 2), 5, "01000"),
        # depth first; a lone token in the middle and at the end joins
        ((((0, 1), 2, (3, 4)), 5), (1, 1, 1, 1, 1, 1), 5, "100100"),
        # a word longer than the cutoff is one macro action
        ((0, (1, 2)), (6, 1, 1), 5, "10000010"),
        # a word without tokens of its own is not there; unary nodes change nothing
        ((((0,),), (1, ((2, 3),))), (2, 0, 2, 1), 3, "10100"),
        ((0, (1, 2)), (1, 2, 2), 6, "10000"),
        (0, (1,), 5, "0"),
    ],
)
def test_macro_starts(tree, counts, cutoff, starts):
    assert macro_starts(tree, counts, cutoff) == tuple(c == "1" for c in starts)


def test_a_parse_by_hand_on_ragged_rows():
    """(a bb)(c (d e)) with bb in two tokens; the end token joins what is before it."""
    tok = tokenizer("Ġa", "Ġb", "Ġc", "Ġd", "Ġe")
    tree = ((0, 1), (2, (3, 4)))
    rows = [["Ġa", "Ġb", "b", "Ġc", "Ġd", "Ġe", "<eos>"], ["Ġa", "Ġb", "Ġc", "Ġd", "Ġe"], ["<eos>"]]
    tokens, mask = batch(tok, *rows)
    segmenter = Constituency(tok, whole(tree), cutoff=4)
    segments = segmenter(tokens, mask)
    check_segments(segments, mask)
    assert segments.tolist() == [
        [0, 0, 0, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, -1, -1],
        [0, -1, -1, -1, -1, -1, -1],
    ]
    assert (segmenter.sentences, segmenter.fallbacks) == (3, 0)


def test_padding_anywhere_changes_nothing():
    tok = tokenizer("Ġa", "Ġb", "Ġc", "Ġd", "Ġe")
    tokens, mask = batch(tok, ["Ġa", "Ġb", "b", "Ġc", "Ġd", "Ġe", "<eos>"])
    segmenter = Constituency(tok, whole(((0, 1), (2, (3, 4)))), cutoff=4)
    expected = segmenter(tokens, mask)[0]
    holes = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    spread = torch.full(holes.shape, 7).masked_scatter(holes, tokens)
    segments = segmenter(spread, holes)
    check_segments(segments, holes)
    assert torch.equal(segments[holes], expected)


def test_a_sentence_without_a_parse_falls_back_to_tokens_alone():
    tok = tokenizer("Ġa", "Ġb", "Ġc")
    tokens, mask = batch(tok, ["Ġa", "Ġb", "Ġc", "Ġa", "Ġb", ".", "<eos>"])

    def parse(texts):
        assert texts == [" a b c a b."]
        return [[Sentence((1, 3, 5), None), Sentence((7, 9, 10), ((0, 1), 2))]]

    segmenter = Constituency(tok, parse)
    assert segmenter(tokens, mask).tolist() == [[0, 1, 2, 3, 3, 3, 3]]
    assert (segmenter.sentences, segmenter.fallbacks) == (2, 1)


def test_tokens_belong_to_the_word_of_their_first_letter():
    """A space alone goes with the word after it, a token of two words with the first, a letter of
    several bytes with itself, what follows the last word with that."""
    tok = tokenizer("Ġa", "ĠbĠc", "Ġ")
    eacute = [tok.backend_tokenizer.pre_tokenizer.pre_tokenize_str("é")[0][0][i] for i in (0, 1)]
    tokens, mask = batch(tok, ["Ġa", "ĠbĠc", "Ġ", *eacute, "x", "Ġ", "<eos>"])

    def parse(texts):
        assert texts == [" a b c éx "]
        return [[Sentence((1, 3, 5, 7), ((0,), (1, 2), 3))]]

    segmenter = Constituency(tok, parse, cutoff=3)
    assert segmenter(tokens, mask).tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]]


def test_sentencepiece_writes_the_same_words():
    made = Tokenizer(models.BPE({p: i for i, p in enumerate(["</s>", "▁a", "▁b", "<0x62>"])}, []))
    tok = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    segmenter = Constituency(tok, whole((0, 1)), cutoff=3)
    assert segmenter._read([1, 2, 3, 0]) == (" a bb", [1, 3, 4, None])


def test_what_cannot_be_read_is_one_clear_error():
    made = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]"))
    with pytest.raises(ValueError, match="byte-level BPE and SentencePiece"):
        Constituency(PreTrainedTokenizerFast(tokenizer_object=made), whole(0))
    with pytest.raises(ValueError, match="cutoff: must be at least 2"):
        Constituency(tokenizer(), whole(0), cutoff=1)


def test_the_segmenters_find_it_in_their_module():
    assert segment.Constituency is Constituency
    with pytest.raises(AttributeError, match="no attribute 'Constituencies'"):
        segment.Constituencies  # noqa: B018


# The twins' grammars


def phrases(task):
    """Every clause that the twin writes, as templates."""
    if task == "tldr":
        clauses = [text for texts in tldr_twin.CLAUSES.values() for text in texts]
        return [*clauses, *tldr_twin.DISTRACTORS.values(), *tldr_twin.FILLERS]
    if task == "webgpt":
        clauses = [text for texts in webgpt_twin.STATEMENTS.values() for text in texts]
        return [*clauses, *webgpt_twin.CLAIMS, *webgpt_twin.HEDGES]
    reports = [r.replace("{x}", f"{{{k}}}") for k, e in hh_twin.ERRANDS.items() for r in e.reports]
    fixed = (hh_twin.INVENTED, hh_twin.OFFERS, hh_twin.RUDE, hh_twin.OPENERS, hh_twin.CLOSERS)
    return [*reports, *(t for each in fixed for t in each), *hh_twin.FILLERS]


def values(task):
    if task == "hh":
        return {kind: errand.values for kind, errand in hh_twin.ERRANDS.items()}
    return (tldr_twin if task == "tldr" else webgpt_twin).VALUES


@pytest.mark.parametrize("task", TASKS)
def test_the_grammar_gives_back_its_treebank(task):
    """The likeliest parse of every clause is the tree that stands for it."""
    parser, bank = ClauseParser(task), treebank(task)
    for tree in bank:
        words = tree.leaves()
        first = [values(task)[w[1:-1]][0] if w[0] == "{" else w for w in words]
        assert nested(parser(first)) == nested(tree), tree


@pytest.mark.parametrize("task", TASKS)
def test_all_that_a_twin_writes_is_parsed(task):
    parser = TwinParser(task)
    for template in phrases(task):
        for i in range(20):
            filled = {slot: each[i % len(each)] for slot, each in values(task).items()}
            (sentences,) = parser([f" {template.format(**filled)}."])
            assert all(s.tree is not None for s in sentences), template


def test_a_clause_opened_by_a_filler_and_one_the_policy_recombined():
    parser = ClauseParser("tldr")
    tree = parser(["you", "know", "op", "lost", "the", "lamp"])
    assert (
        str(Tree.convert(tree[0][1]))
        == "(S (NP (NN op)) (VP (VBD lost) (NP (DT the) (NN {item}))))"
    )
    assert tree[0][0].label() == "PRN"
    assert parser(["op", "lost", "the", "lam"]) is None
    assert parser(["lamp", "the", "lost", "op"]) is None
    assert parser([]) is None


def test_sentences_of_a_twin_are_clauses_with_their_joint():
    text = " it rains a lot, they tok the lamp and op likes tea.."
    (sentences,) = TwinParser("tldr")([text])
    words = [[text[i:].split(" ")[0].strip(",.") or text[i] for i in s.starts] for s in sentences]
    assert words[0] == ["it", "rains", "a", "lot", ","]
    assert [s.tree is None for s in sentences] == [False, True, False, True]
    assert sentences[2].tree == (((((0,),), ((1,), ((2,),))),), 3)
    (cited,) = TwinParser("webgpt")([" the one in charge is mara³. it is always great fun"])
    assert [len(s.starts) for s in cited] == [8, 5]
    assert all(s.tree is not None for s in cited)


def test_a_task_without_a_grammar_is_one_clear_error():
    with pytest.raises(ValueError, match="'apps' has no grammar .* tldr, hh, webgpt"):
        make_parser("twin", "apps")


# A trained parser, against stored parses

PENN = (
    "(ROOT (S (NP (DT The) (JJ old) (NN dog)) (VP (VBD chased) (NP (NP (DT a) (NN cat)) (PP (IN "
    "across) (NP (DT the) (NN street))))) (. .)))",
    "(ROOT (S (NP (PRP I)) (VP (MD ca) (RB n't) (VP (VB say) (SBAR (IN that) (S (NP (PRP it)) (VP "
    "(VBD helped)))))) (. .)))",
)
TEXT = " The old dog chased a cat across the street. I can't say that it helped."


def stanza_tree(tree):
    if isinstance(tree, str):
        return SimpleNamespace(label=tree, children=())
    return SimpleNamespace(label=tree.label(), children=tuple(map(stanza_tree, tree)))


class StoredPipeline:
    """Gives the stored parses in the form that stanza does: "can't" is a token of two words, of
    which no place is known."""

    def bulk_process(self, texts):
        assert list(texts) == [TEXT]
        sentences, place = [], 0
        for penn in PENN:
            tree, tokens = Tree.fromstring(penn), []
            leaves = [leaf for leaf in tree.leaves() if leaf != "n't"]
            for leaf in leaves:
                place = TEXT.index(leaf, place)
                inside = 2 if leaf == "ca" else 1
                start = None if inside == 2 else place
                words = [SimpleNamespace(start_char=start)] * inside
                tokens.append(SimpleNamespace(start_char=place, words=words))
                place += len(leaf)
            tree = stanza_tree(tree)
            sentences.append(SimpleNamespace(tokens=tokens, constituency=tree))
        return [SimpleNamespace(sentences=sentences)]


def test_stored_parses_of_english_become_macro_actions():
    words = " The| old| dog| chased| a| cat| across| the| street|.| I| can|'t| say| that| it| help"
    pieces = [*words.split("|"), "ed", "."]
    tok = tokenizer(*dict.fromkeys(p.replace(" ", "Ġ") for p in pieces if len(p) > 1))
    tokens, mask = batch(tok, [*(piece.replace(" ", "Ġ") for piece in pieces), "<eos>"])
    segmenter = Constituency(tok, StanzaParser(StoredPipeline()))
    (segments,) = segmenter(tokens, mask).tolist()
    made = [""] * (segments[-1] + 1)
    for piece, number in zip([*pieces, ""], segments, strict=True):
        made[number] += piece
    assert made == [
        " The old dog chased",
        " a cat",
        " across the street. I",
        " can't say",
        " that it helped.",
    ]
    assert (segmenter.sentences, segmenter.fallbacks) == (2, 0)


def test_a_tree_that_does_not_fit_the_words_is_no_parse():
    pipeline = StoredPipeline()
    real = pipeline.bulk_process

    def shorter(texts):
        documents = real(texts)
        documents[0].sentences[0].tokens.pop()
        documents[0].sentences[1].constituency = None
        return documents

    pipeline.bulk_process = shorter
    found, empty = StanzaParser(pipeline)([TEXT, " "])
    assert [s.tree for s in found] == [None, None]
    assert empty == []


def test_a_parser_that_is_not_installed_names_the_command(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr("marlhf.parsing.importlib.import_module", missing)
    with pytest.raises(ValueError, match=r"pip install 'marlhf\[parsing\]'"):
        make_parser("stanza", "tldr")


def test_a_parser_without_models_names_the_command(monkeypatch):
    class Stanza:
        def Pipeline(self, *args, **kwargs):
            assert kwargs["download_method"] is None
            raise FileNotFoundError("Resources file not found at: x\nmore")

    monkeypatch.setattr("marlhf.parsing.importlib.import_module", lambda name: Stanza())
    with pytest.raises(ValueError, match=r"not found at: x\).*stanza.download\('en'"):
        make_parser("stanza", "tldr")
