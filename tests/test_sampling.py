"""Sampling: draws follow the distribution, which is the learner's, whatever batch and padding."""

import gc
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from scipy import stats
from tinymodels import CONFIGS, PROMPTS, TOLERANCE, make
from transformers.cache_utils import StaticLayer

from marlhf import compiled
from marlhf.config import ModelConfig
from marlhf.models import gather_logprobs, load_policy, pack, response_logits
from marlhf.sampling import Sampler, draw, keyed_uniforms
from marlhf.text import Prompt, decode, encode_prompt, left_pad, load_tokenizer

STORIES = Path(__file__).parents[2] / "shared/data/models/stories260K"
TOKENS = SimpleNamespace(pad_token_id=0, eos_token_id=1)
LAST = float(np.float32(1 - 2**-24))  # the largest uniform number there is


def uniforms(rows, length=12, seed=0):
    return keyed_uniforms(seed, "test", 0, [f"p{i}" for i in range(rows)], length)


def run(model, prompts=PROMPTS, temperature=1.0, top_k=None, extra=0, which=None, length=12):
    """Samples some of the prompts, with `extra` columns more of left padding."""
    which = list(range(len(prompts))) if which is None else which
    ids, mask = left_pad([prompts[i] for i in which], 0)
    ids, mask = (torch.nn.functional.pad(x, (extra, 0)) for x in (ids, mask))
    numbers = uniforms(len(prompts), length)[which]
    return Sampler(model, TOKENS, temperature, top_k)(ids, mask, numbers), ids, mask


# One draw


@pytest.mark.parametrize("top_k", [None, 4])
def test_draw_follows_the_distribution(top_k):
    logits = torch.tensor([0.3, -1.0, 2.0, 1.1, -0.4, 0.0, 1.9, -2.0])
    numbers = torch.from_numpy(np.random.default_rng(0).random(40000, dtype=np.float32))
    tokens, logprob, full, kept = draw(logits.expand(40000, 8), numbers, 0.7, top_k)
    scaled = logits / 0.7
    if top_k:
        low = scaled.topk(4).values[-1]
        assert set(kept[0].tolist()) == {0, 2, 3, 6}
        torch.testing.assert_close(full, scaled.log_softmax(-1)[tokens])
        scaled = scaled.masked_fill(scaled < low, -torch.inf)
    probabilities = scaled.softmax(-1)
    counts = np.bincount(tokens.numpy(), minlength=8)
    chosen = probabilities.numpy() > 0
    assert counts[~chosen].sum() == 0
    expected = 40000 * probabilities.numpy()[chosen].astype(float)
    expected *= 40000 / expected.sum()
    assert stats.chisquare(counts[chosen], expected).pvalue > 0.01
    torch.testing.assert_close(logprob, probabilities.log()[tokens], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("number", [0.0, 1e-12, 0.5, LAST])
@pytest.mark.parametrize("width", [5, 600, 50000])
def test_draw_never_takes_what_has_no_probability(number, width):
    logits = torch.full((3, width), -torch.inf)
    logits[0, width // 2] = 1.0
    logits[1, 1:-1] = torch.linspace(-2, 2, width - 2)
    logits[2] = torch.randn(width)
    logits[2, [0, -1]] = -torch.inf
    tokens, logprob, *_ = draw(logits, torch.full((3,), number), 1.0, None)
    assert torch.isfinite(logprob).all()
    assert tokens[0] == width // 2
    assert torch.isfinite(logits.gather(1, tokens[:, None])).all()


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([0.25, 0.5, 0.25]).log().expand(5, 3)
    tokens = draw(logits, torch.tensor([0.0, 0.2, 0.3, 0.7, 0.8]), 1.0, None)[0]
    assert tokens.tolist() == [0, 0, 1, 1, 2]


def test_temperature_zero_is_greedy():
    logits = torch.tensor([[0.0, 3.0, 2.0], [5.0, 3.0, 2.0]])
    tokens, logprob, full, kept = draw(logits, torch.tensor([0.99, 0.99]), 0, None)
    assert tokens.tolist() == [1, 0]
    assert (logprob == 0).all()
    assert (full == 0).all()
    assert kept is None


def test_negative_temperature_is_an_error():
    with pytest.raises(ValueError, match="temperature=-1"):
        Sampler(None, TOKENS, -1)
    with pytest.raises(ValueError, match="rows=0"):
        Sampler(None, TOKENS, 1, rows=0)


def test_keyed_uniforms_depend_on_key_and_prompt_alone():
    numbers = keyed_uniforms(0, "train", 3, ["a", "b", "c"], 6)
    assert numbers.shape == (3, 6)
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert torch.equal(keyed_uniforms(0, "train", 3, ["c", "a"], 6), numbers[[2, 0]])
    for other in ((1, "train", 3), (0, "evaluation", 3), (0, "train", 4)):
        assert not torch.equal(keyed_uniforms(*other, ["a", "b", "c"], 6), numbers)


# Whole responses


@pytest.mark.parametrize("arch", CONFIGS)
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.8, 5)])
def test_sampled_logprobs_are_the_learners(arch, temperature, top_k):
    model = make(arch)
    sample, ids, mask = run(model, temperature=temperature, top_k=top_k)
    packed, starts = pack(ids, mask, sample.tokens, sample.mask, 0)
    there, tokens = sample.mask, sample.tokens[sample.mask]
    logits = response_logits(model, packed, starts, there)
    kept = None if sample.kept is None else sample.kept[there]
    for over, got in ((kept, sample.logprobs), (None, sample.full_logprobs)):
        want = gather_logprobs(logits, tokens, temperature, over)
        torch.testing.assert_close(got[there], want, atol=TOLERANCE, rtol=1e-4)
    if top_k:
        assert (sample.kept == sample.tokens.unsqueeze(-1)).any(-1)[sample.mask].all()
        assert (sample.logprobs > sample.full_logprobs)[sample.mask].all()
    else:
        assert torch.equal(sample.logprobs, sample.full_logprobs)


@pytest.mark.parametrize("arch", CONFIGS)
def test_batch_and_padding_change_no_sample(arch):
    """The tokens are the same, their log-probabilities to 2e-5."""
    model = make(arch)
    whole, *_ = run(model, top_k=20)
    for which, extra in (([2, 0, 1], 0), ([1], 0), ([0, 1, 2], 9)):
        some, *_ = run(model, top_k=20, which=which, extra=extra)
        assert torch.equal(some.tokens, whole.tokens[which])
        assert torch.equal(some.finished, whole.finished[which])
        torch.testing.assert_close(some.logprobs, whole.logprobs[which], atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("arch", CONFIGS)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_chunks_change_no_sample(arch, rows):
    """Five prompts, neither sorted nor a multiple of the rows: the same tokens, the same order."""
    model = make(arch)
    prompts = [*PROMPTS, PROMPTS[0][:2], PROMPTS[2][:3] + [7]]
    ids, mask = left_pad(prompts, 0)
    whole = Sampler(model, TOKENS, 1.0, 20)(ids, mask, uniforms(5))
    widths, forward = [], model.forward
    model.forward = lambda **kw: widths.append(kw["input_ids"].shape) or forward(**kw)
    some = Sampler(model, TOKENS, 1.0, 20, rows=rows)(ids, mask, uniforms(5))
    assert torch.equal(some.tokens, whole.tokens)
    assert torch.equal(some.mask, whole.mask)
    assert torch.equal(some.finished, whole.finished)
    assert torch.equal(some.kept[whole.mask], whole.kept[whole.mask])
    torch.testing.assert_close(some.logprobs, whole.logprobs, atol=TOLERANCE, rtol=1e-4)
    torch.testing.assert_close(some.full_logprobs, whole.full_logprobs, atol=TOLERANCE, rtol=1e-4)
    lengths = sorted(map(len, prompts), reverse=True)
    want = [(len(lengths[i : i + rows]), lengths[i]) for i in range(0, 5, rows)]
    assert [tuple(shape) for shape in widths if shape[1] > 1] == want


def test_a_chunk_ends_when_its_own_rows_have_ended():
    model = make("llama")
    with torch.no_grad():
        model.lm_head.weight[1] += 1.2 * model.lm_head.weight[2:].std()
    ids, mask = left_pad([PROMPTS[i % 3] + [i] for i in range(2, 40)], 0)
    steps, forward = [], model.forward
    model.forward = lambda **kw: steps.append(len(kw["input_ids"])) or forward(**kw)
    whole = Sampler(model, TOKENS, 1.0)(ids, mask, uniforms(38, 20))
    assert sum(steps) == 38 * 20
    steps.clear()
    some = Sampler(model, TOKENS, 1.0, rows=1)(ids, mask, uniforms(38, 20))
    assert torch.equal(some.tokens, whole.tokens)
    assert steps == [1] * int(whole.mask.sum())


def test_only_one_chunks_keys_and_values_live(monkeypatch):
    made, alive = weakref.WeakSet(), []
    init = StaticLayer.__init__

    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.add(self)
        alive.append(len(made))

    monkeypatch.setattr(StaticLayer, "__init__", noted)
    ids, mask = left_pad(PROMPTS, 0)
    Sampler(make("llama"), TOKENS, 1.0, rows=1)(ids, mask, uniforms(3))
    assert alive == [1, 2] * 3  # two layers


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", CONFIGS)
def test_greedy_is_transformers_generate(arch, attention):
    model = make(arch)
    if arch != "gemma2":  # which has eager alone
        model.set_attn_implementation(attention)
    sample, ids, mask = run(model, temperature=0)
    own = model.generate(
        ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=12, pad_token_id=0
    )[:, ids.shape[1] :]
    assert torch.equal(sample.tokens[:, : own.shape[1]], own)


def test_a_response_ends_with_its_end_token():
    model = make("llama")
    with torch.no_grad():
        model.lm_head.weight[1] += 1.2 * model.lm_head.weight[2:].std()
    many = [PROMPTS[i % 3] + [i] for i in range(2, 40)]
    sample, *_ = run(model, many, length=20)
    assert sample.finished.any()
    assert not sample.finished.all()
    lengths = sample.mask.sum(1)
    rows = zip(sample.tokens, sample.mask, lengths.tolist(), sample.finished, strict=True)
    for tokens, mask, length, finished in rows:
        assert mask[:length].all()
        assert not mask[length:].any()
        assert (tokens[:length] == 1).sum() == int(finished)
        assert not finished or tokens[length - 1] == 1
        assert finished or length == 20
        assert (tokens[length:] == 0).all()
    assert (sample.logprobs[~sample.mask] == 0).all()
    assert (sample.full_logprobs[~sample.mask] == 0).all()
    assert (sample.logprobs[sample.mask] < 0).all()


def test_sampling_leaves_the_model_as_it_was():
    model = make("gpt2").train()  # dropout is off while it samples
    one, *_ = run(model)
    assert model.training
    two, *_ = run(model.eval())
    assert not model.training
    assert torch.equal(one.tokens, two.tokens)
    assert not one.logprobs.requires_grad


# The compiled decoding step


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that the step was compiled to; they are run as they stand."""
    found = []

    def backend(graph, _):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "COMPILER", {"backend": backend})
    torch._dynamo.reset()
    compiled._compiled.cache_clear()
    yield found
    torch._dynamo.reset()
    compiled._compiled.cache_clear()


def compare(model, prompts, rows=3, top_k=20):
    """The same sample with the compiled step as without."""
    ids, mask = left_pad(prompts, 0)
    numbers = uniforms(len(prompts))
    want = Sampler(model, TOKENS, 1.0, top_k)(ids, mask, numbers)
    got = Sampler(model, TOKENS, 1.0, top_k, rows, compile=True)(ids, mask, numbers)
    assert torch.equal(got.tokens, want.tokens)
    assert torch.equal(got.mask, want.mask)
    assert torch.equal(got.finished, want.finished)
    torch.testing.assert_close(got.logprobs, want.logprobs, atol=TOLERANCE, rtol=1e-4)
    return want


def lora(seed=0):
    import peft

    model = make("llama")
    torch.manual_seed(seed)
    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, settings)


WIDE = {"gemma2": {"sliding_window": 512}}  # longer than a kept cache


@pytest.mark.parametrize("arch", [*CONFIGS, "lora"])
def test_a_compiled_step_is_the_same_and_is_compiled_once(arch, graphs):
    """Over rollouts of other lengths and rows, weights that change, and a second model."""
    model = lora() if arch == "lora" else make(arch, **WIDE.get(arch, {}))
    first = compare(model, PROMPTS)
    assert len(graphs) == 1
    cache = compiled._CACHES[model][2]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    second = compare(model, [[*PROMPTS[0], *range(20, 40)], *PROMPTS[1:], [5], [6, 7]])
    assert compiled._CACHES[model][2] is cache
    assert not torch.equal(second.tokens[1], first.tokens[1])
    if arch != "lora":
        other = make(arch, **WIDE.get(arch, {}))
        with torch.no_grad():
            other.get_output_embeddings().weight.mul_(-1)
        compare(other, PROMPTS)
        compare(model, PROMPTS[:2])
    assert len(graphs) == 1


def test_a_kept_cache_grows_and_dies_with_its_model(graphs):
    model = make("llama")
    compare(model, PROMPTS)
    assert compiled._CACHES[model][:2] == (3, 128)
    compare(model, [list(range(2, 50)) * 3, *PROMPTS])
    assert compiled._CACHES[model][:2] == (3, 256)
    compare(model, PROMPTS, rows=2)  # and stays long
    assert compiled._CACHES[model][:2] == (2, 256)
    assert len(graphs) == 3
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_more_models_than_the_compiler_allows_by_itself(graphs):
    for rows in range(1, 12):
        compare(make("llama"), PROMPTS * 4, rows=rows)
    assert len(graphs) == 11


def test_a_step_that_cannot_be_compiled_says_so(graphs):
    model = make("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="not with model.attention=flash_attention_2"):
        Sampler(model, TOKENS, 1.0, compile=True)(torch.ones(1, 2).long(), *2 * [torch.ones(1, 2)])
    with pytest.raises(ValueError, match=r"compile: Gemma2ForCausalLM.*window 6"):
        compare(make("gemma2"), PROMPTS)
    model = make("llama")
    forward = model.forward

    def broken(**kwargs):
        torch._dynamo.graph_break()
        return forward(**kwargs)

    model.forward = broken
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be compiled.*compile=false"):
        compare(model, PROMPTS)


@pytest.mark.slow
def test_the_step_compiled_to_machine_code():
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    compare(make("llama"), PROMPTS)


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories model is not on this machine")
def test_a_real_model_tells_the_story_that_generate_tells():
    tokenizer = load_tokenizer(STORIES)
    config = ModelConfig(name=str(STORIES))
    model = load_policy(config, tokenizer).eval()
    starts = ["Once upon a time, there was a", "The cat", "One day, Lily and her mom went to"]
    prompts = [encode_prompt(Prompt("", text, ""), tokenizer, 64) for text in starts]
    ids, mask = left_pad(prompts, tokenizer.pad_token_id)
    sample = Sampler(model, tokenizer, 0)(ids, mask, uniforms(3, 40))
    own = model.generate(
        ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=40,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    assert torch.equal(sample.tokens, own[:, ids.shape[1] :])
    assert "little girl named Lily" in decode(sample.tokens[0], tokenizer)
    assert isinstance(model, transformers.LlamaForCausalLM)
