"""Text in, ids out, and back: budgets, cuts, end tokens, padding, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from marlhf.text import (
    DataError,
    Prompt,
    check_vocabulary,
    decode,
    encode_prompt,
    encode_response,
    left_pad,
    load_tokenizer,
    read_jsonl,
    right_pad,
    train_tokenizer,
)

STORIES = Path(__file__).parents[1] / "../shared/data/models/stories260K"
TEXTS = ["SUBREDDIT: r/home\nPOST: my boss took the lamp.\nTL;DR: op wants the lamp back."] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def llama_tokenizer():
    """A character tokenizer as Llama's: puts a space before every text, strips it in decoding."""
    pieces = ["<s>", "</s>", "\u2581", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(set("".join(TEXTS)) - {" "})
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


# ---------------------------------------------------------------- files


def test_read_jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"a": 1}\n\n{"a": "\u00e9"}\n', encoding="utf-8")
    assert read_jsonl(path) == [{"a": 1}, {"a": "\u00e9"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n\n{"a": \n', r"rows\.jsonl line 3: malformed JSON .* one JSON object a line"),
        (b'{"a": 1}\n[1]\n', r"rows\.jsonl line 2: expected a JSON object, found list"),
        (b"\xff\xfe{}\n", r"rows\.jsonl: not UTF-8 text .* save it as UTF-8"),
    ],
)
def test_read_jsonl_names_file_and_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_jsonl(path)


def test_read_jsonl_without_a_file(tmp_path):
    with pytest.raises(DataError, match="none.jsonl: no such file"):
        read_jsonl(tmp_path / "none.jsonl")


# ---------------------------------------------------------------- tokenizers


def test_train_tokenizer_is_deterministic_and_saved(tokenizer, tmp_path):
    again = train_tokenizer(iter(TEXTS), 300)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")
    assert len(tokenizer) <= 300
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert encode_response(" the lamp", loaded, 9) == encode_response(" the lamp", tokenizer, 9)


def test_train_tokenizer_needs_room_for_the_bytes():
    with pytest.raises(ValueError, match="at least 258 entries, not 200"):
        train_tokenizer(TEXTS, 200)


def test_load_tokenizer_sets_a_missing_padding_token(llama_tokenizer, tmp_path):
    llama_tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id == loaded.eos_token_id == 1


def test_load_tokenizer_without_an_end_token(tmp_path):
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no end token: set eos_token"):
        load_tokenizer(tmp_path)


def test_load_tokenizer_from_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer at .*tokenizer.json") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_check_vocabulary(tokenizer):
    check_vocabulary(tokenizer, LlamaConfig(vocab_size=300))
    with pytest.raises(ValueError, match=r"largest id is \d+ .* embedding has 270 rows"):
        check_vocabulary(tokenizer, LlamaConfig(vocab_size=270))


# ---------------------------------------------------------------- prompts


def shown(prompt, tokenizer, budget):
    ids = encode_prompt(prompt, tokenizer, budget)
    assert len(ids) <= budget
    return tokenizer.decode(ids)


def test_prompt_that_fits_is_left_alone(tokenizer):
    prompt = Prompt("POST: ", "my boss took\n\nthe lamp. ", "\nTL;DR:")
    assert shown(prompt, tokenizer, 50) == prompt.text


def test_body_is_cut_at_the_end_after_whole_words(tokenizer):
    words = [f"word{i}" for i in range(40)]
    prompt = Prompt("POST: ", " ".join(words), "\nTL;DR:")
    for budget in range(20, 60, 3):
        text = shown(prompt, tokenizer, budget)
        kept = text.removeprefix("POST: ").removesuffix("\nTL;DR:").split()
        assert kept == words[: len(kept)]
        longer = Prompt("POST: ", " ".join(words[: len(kept) + 1]), "\nTL;DR:").text
        assert len(tokenizer(longer).input_ids) > budget


def test_body_is_cut_at_the_start_before_a_turn(tokenizer):
    turns = "\n\nHuman: one two\n\nAssistant: three\n\nHuman: four five"
    prompt = Prompt("", turns, "\n\nAssistant:", cut="start")
    full = len(tokenizer(prompt.text).input_ids)
    assert shown(prompt, tokenizer, full) == prompt.text
    text = shown(prompt, tokenizer, full - 1)
    assert text == "\n\nAssistant: three\n\nHuman: four five\n\nAssistant:"
    last = len(tokenizer("\n\nHuman: four five\n\nAssistant:").input_ids)
    assert shown(prompt, tokenizer, last).startswith("\n\nHuman: four")
    assert shown(prompt, tokenizer, last - 2).endswith("five\n\nAssistant:")  # words, at worst


def test_a_body_of_one_word_is_cut_inside_it(tokenizer):
    for cut in ("end", "start"):
        prompt = Prompt("POST: ", "x" * 100, "\nTL;DR:", cut)
        text = shown(prompt, tokenizer, 30)
        assert 10 < text.count("x") < 100
        assert text.startswith("POST: ") and text.endswith("\nTL;DR:")


def test_prompt_begins_with_the_tokenizers_own_specials(llama_tokenizer):
    ids = encode_prompt(Prompt("", "my boss", ":"), llama_tokenizer, 20)
    assert ids[0] == llama_tokenizer.bos_token_id
    assert ids[-1] != llama_tokenizer.eos_token_id


def test_prompt_errors(tokenizer):
    with pytest.raises(DataError, match="empty prompt"):
        encode_prompt(Prompt("", " \n", ""), tokenizer, 9)
    with pytest.raises(DataError, match=r"fixed parts take \d+ of 5 tokens .*data.prompt_tokens"):
        encode_prompt(Prompt("a title far too long: ", "x " * 50, "\nTL;DR:"), tokenizer, 5)
    with pytest.raises(ValueError, match='"end" or "start", not \'middle\''):
        encode_prompt(Prompt("", "x " * 50, ":", cut="middle"), tokenizer, 5)


# ---------------------------------------------------------------- responses


def test_response_ends_where_it_fits(tokenizer):
    ids = encode_response(" op wants", tokenizer, 50)
    assert ids[-1] == tokenizer.eos_token_id
    assert encode_response(" op wants", tokenizer, 50, end=False) == ids[:-1]
    assert encode_response(" op wants", tokenizer, len(ids)) == ids
    assert encode_response(" op wants", tokenizer, len(ids) - 1) == ids[:-1]
    assert encode_response(" op wants", tokenizer, 1) == ids[:1]
    assert encode_response("", tokenizer, 3) == [tokenizer.eos_token_id]
    with pytest.raises(ValueError, match="at least 1 token, not 0"):
        encode_response(" op", tokenizer, 0)


def test_special_tokens_in_a_text_are_only_text(tokenizer, llama_tokenizer):
    for each in (tokenizer, llama_tokenizer):
        text = f" a {each.eos_token} b"
        ids = encode_response(text, each, 99, end=False)
        assert each.eos_token_id not in ids
        assert decode(ids, each) == text
        assert each.eos_token_id not in encode_prompt(Prompt("", text, ":"), each, 99)


def test_the_leading_space_is_the_texts_own(llama_tokenizer):
    bare = encode_response("lamp", llama_tokenizer, 99)
    spaced = encode_response(" lamp", llama_tokenizer, 99)
    space = llama_tokenizer.convert_tokens_to_ids("\u2581")
    assert spaced == [space, *bare]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_decode_inverts_encode(tokenizer, llama_tokenizer, text):
    for each in (tokenizer, llama_tokenizer):
        if "\u2581" in text and each is llama_tokenizer:
            continue  # Llama's own tokenizers cannot tell this character from a space
        ids = encode_response(text, each, 10_000)
        assert decode(ids, each) == text
        assert decode(torch.tensor(ids), each) == text


@pytest.mark.skipif(not STORIES.exists(), reason="needs ../shared/data")
def test_a_real_tokenizer_without_padding_token():
    tokenizer = load_tokenizer(STORIES)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    for text in (" Once upon a time.", "Once", "\n\nOnce ", "  two", " \u6f22 </s>"):
        assert decode(encode_response(text, tokenizer, 99), tokenizer) == text
    row = json.loads((STORIES.parents[1] / "tldr/posts_1945.jsonl").open().readline())
    prompt = Prompt(f"TITLE: {row['title']}\nPOST: ", row["post"], "\nTL;DR:")
    ids = encode_prompt(prompt, tokenizer, 200)
    assert 190 < len(ids) <= 200 and ids[0] == 1
    assert tokenizer.decode(ids).endswith("\nTL;DR:")


# ---------------------------------------------------------------- padding


def test_padding():
    rows = [[5, 6, 7], [], [8]]
    ids, mask = left_pad(rows, 9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 9], [9, 9, 8]] and ids.dtype == torch.int64
    assert mask.tolist() == [[True] * 3, [False] * 3, [False, False, True]]
    ids, mask = right_pad(rows, 9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 9], [8, 9, 9]]
    assert mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert left_pad([], 0)[0].shape == (0, 0)
