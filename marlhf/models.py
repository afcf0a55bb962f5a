"""Policy, critic, reference, reward model: any transformers causal LM, or a tiny one from scratch.

A policy is an ``AutoModelForCausalLM``; a reward model and a critic are
``AutoModelForSequenceClassification`` with one label, whose ``score`` head is read at the last
token (reward model) or at every token (critic). So every checkpoint loads with transformers alone.

Shapes: B rows, P prompt tokens (left padded), T response tokens (right padded), S the longest
prompt and response together, V vocabulary.
A token's log-probability and the value of the state before it are both read one position earlier.
"""

import copy
import ctypes
import os
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from marlhf.config import ModelConfig
from marlhf.placement import precision, running, set_precision
from marlhf.text import check_vocabulary

ARCHITECTURES = ("llama", "gemma")
LOGITS = 2**26  # most float32 logits that are held at once: 256 MiB


def _dtype(name: str) -> torch.dtype:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"model.dtype={name!r} is not one of {', '.join(dtypes)}")
    return dtypes[name]


def tiny_config(config: ModelConfig, vocab_size: int, eos: int, pad: int, bos: int | None = None):
    """A transformers config of a Llama or Gemma shape, small enough to train from scratch on a CPU.

    ``initializer_range = hidden ** -0.5``: at transformers' 0.02 a model this small does not learn
    to copy from its prompt within a thousand steps.
    """
    from transformers import GemmaConfig, LlamaConfig

    tiny = config.tiny
    if tiny.arch not in ARCHITECTURES:
        raise ValueError(f"model.tiny.arch={tiny.arch!r} is not one of {', '.join(ARCHITECTURES)}")
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": tiny.hidden,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "num_key_value_heads": tiny.kv_heads,
        "head_dim": tiny.hidden // tiny.heads,
        "intermediate_size": tiny.ff,
        "max_position_embeddings": 2048,
        "initializer_range": tiny.hidden**-0.5,
        "tie_word_embeddings": True,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "bos_token_id": bos,
    }
    return {"llama": LlamaConfig, "gemma": GemmaConfig}[tiny.arch](**shape)


def _source_exists(name: str) -> None:
    """A folder must hold a model; anything else is taken for a hub name."""
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith(".") or path.is_dir()
    if looks_local and not (path / "config.json").is_file():
        raise ValueError(
            f"{name}: no model in this folder (no config.json); give a folder written by "
            "save_pretrained, or a hub name"
        )


def _no_bars_in_logs() -> None:
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _pretrained(auto, config: ModelConfig, source: str, **kwargs):
    _source_exists(source)
    _no_bars_in_logs()
    try:
        return auto.from_pretrained(
            source,
            revision=config.revision if source == config.name else None,
            dtype=_dtype(config.dtype),
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            **kwargs,
        )
    except OSError as error:
        raise ValueError(
            f"cannot load model {source!r} ({str(error).strip().splitlines()[0]}): give one with "
            "safetensors; a gated one (Gemma): accept its licence on the hub, `hf auth login`"
        ) from error


def _add_lora(model, config: ModelConfig, task_type: str, seed: int):
    from peft import LoraConfig, get_peft_model

    lora = config.lora
    torch.manual_seed(seed)
    return get_peft_model(
        model,
        LoraConfig(
            task_type=task_type,
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.targets,
            modules_to_save=["score"] if task_type == "SEQ_CLS" else None,
        ),
    )


def load_policy(config: ModelConfig, tokenizer, source: str | Path | None = None, seed: int = 0):
    """A causal LM from ``source`` (folder or hub name), else ``config.name``; "tiny" is made here.

    LoRA adapters are added when ``config.lora.rank > 0``. Raises ValueError for a folder without a
    model, an unreachable name, or a tokenizer whose ids exceed the embedding.
    """
    from transformers import AutoModelForCausalLM

    name = str(source) if source is not None else config.name
    torch.manual_seed(seed)
    if name == "tiny":
        shape = tiny_config(
            config,
            len(tokenizer),
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            tokenizer.bos_token_id,
        )
        model = AutoModelForCausalLM.from_config(
            shape, attn_implementation=config.attention, dtype=_dtype(config.dtype)
        )
    else:
        model = _pretrained(AutoModelForCausalLM, config, name)
    check_vocabulary(tokenizer, model.config)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if config.lora.rank > 0:
        model = _add_lora(model, config, "CAUSAL_LM", seed)
    set_precision(model, config)
    return model


def load_scalar(
    config: ModelConfig, tokenizer, source: str | Path, zero_head: bool = False, seed: int = 0
):
    """A one-label sequence classifier on the backbone at ``source``: reward model or critic.

    A head that the source lacks (it was a causal LM) is drawn from ``seed``, or zero.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a head that is not in the source is expected here
    torch.manual_seed(seed)
    try:
        model = _pretrained(AutoModelForSequenceClassification, config, str(source), num_labels=1)
    finally:
        logging.set_verbosity(verbosity)
    check_vocabulary(tokenizer, model.config)
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if zero_head:
        nn.init.zeros_(backbone_and_head(model)[1].weight)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if config.lora.rank > 0:
        model = _add_lora(model, config, "SEQ_CLS", seed)
    set_precision(model, config)
    return model


def reuse_memory() -> None:
    """Tells glibc to keep freed memory: it would return every large tensor to the system, and the
    page faults of taking it back cost a tenth of an update on a CPU. Nothing happens elsewhere."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim, top_pad, mmap_max = -1, -2, -4
        mallopt(mmap_max, 0)
        mallopt(trim, 2**31 - 1)
        mallopt(top_pad, 2**28)


def is_lora(model) -> bool:
    return hasattr(model, "peft_config")


def _inner(model):
    return model.get_base_model() if is_lora(model) else model


def backbone_of(model):
    """The transformer under a causal LM's or classifier's head, LoRA or not."""
    inner = _inner(model)
    return getattr(inner, inner.base_model_prefix)


def backbone_and_head(model):
    """The transformer and the ``score`` head of a sequence classifier, LoRA or not."""
    inner = _inner(model)
    head = getattr(inner, "score", None)
    if head is None:
        raise ValueError(f"{type(inner).__name__} has no `score` head on a causal backbone")
    return backbone_of(model), head


def position_ids(mask: torch.Tensor) -> torch.Tensor:
    """Positions that count valid tokens only, so that left padding changes nothing. ``[B, P]``."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def pack(prompt_ids, prompt_mask, tokens, mask, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts ``[B, P]`` and responses ``[B, T]`` -> ids ``[B, S]``, starts ``[B]``.

    Each row is its prompt and its response without a gap, padded on the right alone: under causal
    attention no padding mask is needed then. The response begins at ``starts``.
    """
    both = torch.cat([prompt_ids, tokens], 1)
    valid = torch.cat([prompt_mask, mask], 1)
    order = (~valid).int().argsort(dim=1, stable=True)  # valid tokens first, in their order
    longest = int(valid.sum(1).max())
    return both.masked_fill(~valid, pad).gather(1, order)[:, :longest], prompt_mask.sum(1)


@contextmanager
def feed_forward_at(backbone, places: torch.Tensor):
    """Within, the last layer's feed-forward part runs at the flat ``places`` of ``[B, S]`` alone.

    It works on each position by itself and nothing after it mixes positions, so that it is lost
    work where the hidden state is not read (it is 0 there). Without effect on an architecture that
    has no ``layers[-1].mlp``, on experts, and where the layer is run again by the backward pass.
    """
    layers = getattr(backbone, "layers", None)
    mlp = getattr(layers[-1], "mlp", None) if layers else None
    again = torch.is_grad_enabled() and getattr(backbone, "gradient_checkpointing", False)
    if mlp is None or hasattr(mlp, "experts") or again:
        yield
        return
    shape = None

    def select(_, inputs):
        nonlocal shape
        shape = inputs[0].shape
        return (inputs[0].flatten(0, 1).index_select(0, places).unsqueeze(0),)

    def put_back(_, inputs, output):
        full = output.new_zeros(shape).flatten(0, 1)
        return full.index_copy(0, places, output.squeeze(0)).view(shape)

    handles = mlp.register_forward_pre_hook(select), mlp.register_forward_hook(put_back)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hidden_at(backbone, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Last hidden states ``[N, d]`` of right-padded ids ``[B, S]`` at flat places ``[N]``."""
    with feed_forward_at(backbone, places):
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, places)


def output_logits(model, hidden: torch.Tensor) -> torch.Tensor:
    """Logits ``[..., V]`` of last hidden states ``[..., d]``.

    (A model that does more to its logits than Gemma-2's soft cap fails the trainer's first
    comparison with the sampler, loudly.)
    """
    inner = _inner(model)
    logits = inner.get_output_embeddings()(hidden)
    cap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def response_hidden(backbone, ids: torch.Tensor, starts: torch.Tensor, mask: torch.Tensor):
    """Hidden states ``[N, d]`` one position before each of the N valid response tokens, by rows."""
    ids = ids[:, :-1]  # nothing is predicted after the last token
    rows = torch.arange(len(ids), device=ids.device)[:, None] * ids.shape[1]
    steps = torch.arange(mask.shape[1], device=ids.device)
    return hidden_at(backbone, ids, (rows + starts[:, None] - 1 + steps)[mask])


def response_logits(model, ids: torch.Tensor, starts: torch.Tensor, mask: torch.Tensor):
    """Logits ``[N, V]`` that predict the N valid response tokens of packed ids ``[B, S]``."""
    return output_logits(model, response_hidden(backbone_of(model), ids, starts, mask))


def response_tokens(ids: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """The response tokens ``[B, length]`` of packed ``ids``; whatever stands there off the mask."""
    index = starts[:, None] + torch.arange(length, device=ids.device)
    return ids.gather(1, index.clamp(max=ids.shape[1] - 1))


def gather_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0, kept=None
) -> torch.Tensor:
    """log softmax(logits / temperature) at ``tokens``; float32, shape of ``tokens``.

    With ``kept`` ``[..., k]`` (the ids that top-k sampling kept) the softmax is over those alone:
    the distribution that was sampled from stays the one that is optimised, after updates too.
    """
    scaled = logits.float() / temperature
    if kept is None:
        losses = F.cross_entropy(scaled.flatten(0, -2), tokens.flatten(), reduction="none")
        return -losses.view_as(tokens)
    logprobs = scaled.gather(-1, kept).log_softmax(-1)
    where = (kept == tokens.unsqueeze(-1)).float().argmax(-1, keepdim=True)
    return logprobs.gather(-1, where).squeeze(-1)


def token_logprobs(model, hidden, tokens, temperature: float = 1.0, kept=None, entropy=False):
    """log softmax(logits / temperature) at ``tokens`` ``[N]``, float32; with ``entropy`` the pair
    of it and the entropy ``[N]`` in nats over the whole vocabulary, which has no gradient.

    hidden ``[N, d]`` are the last hidden states that predict the tokens; ``kept`` ``[N, k]`` as in
    `gather_logprobs`. No more than ``LOGITS`` logits are there at once: beyond that they are made
    chunk by chunk, and once more in the backward pass.
    """

    def one(hidden, tokens, kept):
        logits = output_logits(model, hidden)
        if not entropy:
            return gather_logprobs(logits, tokens, temperature, kept)
        every = (logits.float() / temperature).log_softmax(-1)  # [n, V]
        with torch.no_grad():
            entropies = -torch.linalg.vecdot(every.exp(), every)
        if kept is not None:
            return gather_logprobs(logits, tokens, temperature, kept), entropies
        return every.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropies

    rows = max(1, LOGITS // model.config.get_text_config().vocab_size)
    if len(hidden) <= rows:
        return one(hidden, tokens, kept)
    chunks = range(0, len(hidden), rows)
    made = [
        checkpoint(
            one,
            hidden[i : i + rows],
            tokens[i : i + rows],
            None if kept is None else kept[i : i + rows],
            use_reentrant=False,
        )
        for i in chunks
    ]
    if not entropy:
        return torch.cat(made)
    return tuple(torch.cat(column) for column in zip(*made, strict=True))


def unravel(flat: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Numbers of the valid tokens ``[N]``, row by row, in their places ``[B, T]``; 0 elsewhere."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def token_values(model, ids, starts, mask: torch.Tensor) -> torch.Tensor:
    """V(s_t) ``[B, T]``, float32, 0 off the mask: s_t is the prompt and the tokens before t."""
    backbone, head = backbone_and_head(model)
    hidden = response_hidden(backbone, ids, starts, mask)
    return unravel(head(hidden).squeeze(-1).float(), mask)


def sequence_scores(model, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The score ``[B]``, float32, at the last of each row's ``lengths`` right-padded tokens."""
    backbone, head = backbone_and_head(model)
    last = torch.arange(len(ids), device=ids.device) * ids.shape[1] + lengths - 1
    return head(hidden_at(backbone, ids, last)).squeeze(-1).float()


class ActorCritic(nn.Module):
    """Policy and critic as one module, so that one optimizer and one wrapper drive both.

    ``value = value_scale * score + value_shift``: a critic started from the reward model begins on
    the scale of the standardised reward.
    """

    def __init__(self, policy, critic, value_shift: float = 0.0, value_scale: float = 1.0):
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.value_shift = value_shift
        self.value_scale = value_scale
        # what a wrapper that shares weights out takes for one unit: a layer
        self._no_split_modules = getattr(policy, "_no_split_modules", None)

    def forward(self, ids, starts, mask, temperature: float = 1.0, kept=None, parts="both"):
        """-> log-probabilities, values, entropies of the response tokens on ``mask`` ``[B, T]``.

        Each is float32 ``[B, T]`` and 0 off the mask. The entropy, in nats, is that of
        softmax(logits / temperature) over the whole vocabulary.
        ``parts="values"`` gives the values alone. Everything goes through this one call, because a
        wrapper for several processes sees no other.
        """
        with precision(self.policy):
            values = token_values(self.critic, ids, starts, mask)
            values = torch.where(mask, values * self.value_scale + self.value_shift, 0.0)
            if parts == "values":
                return values
            tokens = response_tokens(ids, starts, mask.shape[1])[mask]
            hidden = response_hidden(backbone_of(self.policy), ids, starts, mask)
            kept = None if kept is None else kept[mask]
            logprobs, entropies = token_logprobs(
                self.policy, hidden, tokens, temperature, kept, entropy=True
            )
            return unravel(logprobs, mask), values, unravel(entropies, mask)

    def parameter_groups(self, lr: float, critic_lr: float, weight_decay: float) -> list[dict]:
        """One optimizer group for the policy and one for the critic, in that order."""
        rates = ((self.policy, lr), (self.critic, critic_lr))
        return [
            {
                "params": [p for p in module.parameters() if p.requires_grad],
                "lr": rate,
                "weight_decay": weight_decay,
            }
            for module, rate in rates
        ]


class Reference:
    """pi_ref: a frozen copy of the policy, or under LoRA the policy itself with its adapter off."""

    def __init__(self, policy):
        self.model = policy if is_lora(policy) else copy.deepcopy(policy).requires_grad_(False)
        self.model.eval()

    @torch.no_grad()
    def logprobs(self, ids, starts, tokens, mask, *temperatures: float) -> list[torch.Tensor]:
        """log pi_ref of response ``tokens`` ``[B, T]``, 0 off the mask, at each temperature."""
        bare = self.model.disable_adapter() if is_lora(self.model) else nullcontext()
        with bare, running(self.model):
            hidden = response_hidden(backbone_of(self.model), ids, starts, mask)
            found = [token_logprobs(self.model, hidden, tokens[mask], t) for t in temperatures]
        return [unravel(each, mask) for each in found]


def save_model(model, tokenizer, folder: str | Path, state: dict | None = None) -> None:
    """safetensors that transformers loads with nothing of ours; LoRA is merged in a copy first.

    `state` is `placement.whole_state` of the model: its weights, where they are in shares.
    """
    _no_bars_in_logs()
    if is_lora(model):
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(os.fspath(folder), state_dict=state)
    tokenizer.save_pretrained(os.fspath(folder))
