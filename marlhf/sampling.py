"""Batched sampling with a key-value cache.

One uniform number per token decides it, by inverting the cumulative distribution; the numbers are
keyed by (seed, stream, update, prompt), so that a row's response depends neither on the batch it is
sampled in, nor on its place there, nor on what was sampled before.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch

from marlhf.models import backbone_of, feed_forward_at, position_ids
from marlhf.placement import running
from marlhf.runs import keyed_rng


@dataclass
class Sample:
    """Responses ``[B, T]`` right padded; the end token, where sampled, is part of the response."""

    tokens: torch.Tensor  # int64 [B, T], pad id off the mask
    mask: torch.Tensor  # bool [B, T]
    finished: torch.Tensor  # bool [B]: an end token was sampled
    logprobs: torch.Tensor  # float32 [B, T] under the distribution sampled from; 0 off the mask
    full_logprobs: torch.Tensor  # float32 [B, T] at the same temperature over the whole vocabulary
    kept: torch.Tensor | None  # int64 [B, T, k]: the ids that top-k kept; None without top-k

    def __getitem__(self, index: torch.Tensor | slice) -> "Sample":
        """Some of the rows, in the order of ``index``."""
        parts = (getattr(self, field.name) for field in fields(self))
        return Sample(*(None if part is None else part[index] for part in parts))

    @staticmethod
    def cat(samples: list["Sample"]) -> "Sample":
        """The rows of several samples of one length, one below the other."""
        columns = ([getattr(sample, field.name) for sample in samples] for field in fields(Sample))
        return Sample(*(None if parts[0] is None else torch.cat(parts) for parts in columns))


def keyed_uniforms(seed: int, stream: str, update: int, prompts: list[str], length: int):
    """Uniform numbers in [0, 1), ``[B, length]``; row i is keyed by its own prompt alone."""
    rows = [keyed_rng(seed, stream, update, p).random(length, dtype=np.float32) for p in prompts]
    return torch.from_numpy(np.stack(rows))


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_k: int | None):
    """One token a row by inverse CDF: logits ``[B, V]``, uniform ``[B]``.

    -> tokens, log-probabilities as sampled and over the whole vocabulary, kept ids or None.
    Temperature 0 takes the most likely token, with log-probability 0.
    """
    if temperature == 0:
        tokens = logits.argmax(-1)
        zero = torch.zeros_like(uniform)
        return tokens, zero, zero, None
    full = (logits.float() / temperature).log_softmax(-1)
    kept, logprobs = None, full
    if top_k is not None and top_k < full.shape[-1]:
        logprobs, kept = full.topk(top_k, dim=-1)
        logprobs = logprobs.log_softmax(-1)
    cumulative = logprobs.exp().cumsum(-1)
    # scaled by the total, so that rounding in the sum cannot leave a gap at the end
    target = (uniform * cumulative[:, -1]).unsqueeze(-1)
    index = torch.searchsorted(cumulative, target, right=True).clamp_(max=logprobs.shape[-1] - 1)
    tokens = (index if kept is None else kept.gather(-1, index)).squeeze(-1)
    return (
        tokens,
        logprobs.gather(-1, index).squeeze(-1),
        full.gather(-1, tokens.unsqueeze(-1)).squeeze(-1),
        kept,
    )


def attention_of(config) -> str:
    """The kernel in use; sdpa takes a boolean mask, eager adds its mask."""
    return config.get_text_config()._attn_implementation


def _full_attention(config) -> bool:
    """Whether one boolean mask serves all layers: each attends to the whole context."""
    text = config.get_text_config()
    if attention_of(config) != "sdpa":
        return False
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return all(kind == "full_attention" for kind in kinds)
    return getattr(text, "sliding_window", None) is None


def decoding_step(model, tokens, attend, position, cache):
    """Logits ``[B, V]`` after one more token: tokens and position ``[B, 1]``."""
    return model(
        input_ids=tokens,
        attention_mask=attend,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
    ).logits[:, -1]


class Sampler:
    """Samples responses from a causal LM. A serving engine can stand behind the same call.

    ``sampler(ids [B, P], mask [B, P], uniforms [B, T]) -> Sample``

    With ``rows`` set, more prompts than that are sampled in chunks of as many, sorted by length:
    only one chunk's keys and values live at a time, and it ends when its own rows have ended. The
    tokens are the same; log-probabilities differ by rounding.

    With ``compile`` the decoding step is compiled, for one number of rows (``rows``, where it is
    set: fewer prompts are filled up); the model's cache then lives as long as the model.
    """

    def __init__(
        self, model, tokenizer, temperature: float, top_k: int | None = None,
        rows: int | None = None, compile: bool = False,
    ):  # fmt: skip
        if temperature < 0:
            raise ValueError(f"temperature={temperature} must not be negative")
        if rows is not None and rows < 1:
            raise ValueError(f"rows={rows} must be at least 1")
        self.model = model
        self.pad = tokenizer.pad_token_id
        self.eos = tokenizer.eos_token_id
        self.temperature = temperature
        self.top_k = top_k
        self.rows = rows
        self.compile = compile

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, uniforms: torch.Tensor) -> Sample:
        with running(self.model):
            if self.rows is None or len(ids) <= self.rows:
                return self._chunk(ids, mask, uniforms)
            lengths = mask.sum(1)
            # the longest first: what does not fit in memory fails at once
            order = lengths.argsort(stable=True, descending=True)
            parts = []
            for index in order.split(self.rows):
                width = int(lengths[index[0]])
                numbers = uniforms[index.to(uniforms.device)]
                parts.append(self._chunk(ids[index, -width:], mask[index, -width:], numbers))
            return Sample.cat(parts)[order.argsort()]

    def _chunk(self, ids: torch.Tensor, mask: torch.Tensor, uniforms: torch.Tensor) -> Sample:
        missing = (self.rows or 0) - len(ids)
        if not self.compile or missing <= 0:
            return self._sample(ids, mask, uniforms)
        # copies of the first row end when it ends
        filled = (torch.cat([x, x[:1].expand(missing, -1)]) for x in (ids, mask, uniforms))
        return self._sample(*filled)[: len(ids)]

    def _sample(self, ids: torch.Tensor, mask: torch.Tensor, uniforms: torch.Tensor) -> Sample:
        from transformers import StaticCache

        model, (rows, prompt), length = self.model, ids.shape, uniforms.shape[1]
        training = model.training
        model.eval()
        device = ids.device
        uniforms = uniforms.to(device)
        width = prompt + length
        if self.compile:
            from marlhf.compiled import compiled_step, kept_cache

            cache, width = kept_cache(model, rows, width)
        else:
            cache = StaticCache(config=model.config, max_cache_len=width)
        attend = torch.zeros(rows, width, dtype=torch.bool, device=device)
        attend[:, :prompt] = mask
        plain = _full_attention(model.config)
        step = compiled_step if self.compile else decoding_step
        position = mask.long().sum(-1, keepdim=True)

        tokens = torch.full((rows, length), self.pad, dtype=torch.long, device=device)
        valid = torch.zeros(rows, length, dtype=torch.bool, device=device)
        logprobs = torch.zeros(rows, length, device=device)
        full = torch.zeros(rows, length, device=device)
        kept = None
        alive = torch.ones(rows, dtype=torch.bool, device=device)
        # asking an accelerator whether all rows have ended makes the host wait for it
        every = 1 if device.type == "cpu" else 16

        last = torch.arange(1, rows + 1, device=device) * prompt - 1
        with feed_forward_at(backbone_of(model), last):
            logits = model(
                input_ids=ids,
                attention_mask=mask.long(),
                position_ids=position_ids(mask),
                past_key_values=cache,
                logits_to_keep=1,
                use_cache=True,
            ).logits[:, -1]
        for t in range(length):
            token, logprob, whole, ids_kept = draw(
                logits, uniforms[:, t], self.temperature, self.top_k
            )
            tokens[:, t] = torch.where(alive, token, self.pad)
            valid[:, t] = alive
            logprobs[:, t] = torch.where(alive, logprob, 0.0)
            full[:, t] = torch.where(alive, whole, 0.0)
            if ids_kept is not None:
                if kept is None:
                    kept = ids_kept.new_zeros(rows, length, ids_kept.shape[-1])
                kept[:, t] = ids_kept
            alive = alive & (token != self.eos)
            if t == length - 1 or ((t + 1) % every == 0 and not alive.any()):
                break
            attend[:, prompt + t] = True
            if self.compile:
                seen = attend
            else:
                seen = attend[:, None, None, :] if plain else attend[:, : prompt + t + 1]
            logits = step(model, tokens[:, t : t + 1], seen, position, cache)
            position = position + 1
        model.train(training)
        return Sample(tokens, valid, ~alive, logprobs, full, kept)
