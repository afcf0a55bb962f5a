"""How much memory a preset takes, before anything is downloaded or loaded.

The models are built from their shapes as fake tensors, which hold no numbers, and one update of
policy and critic is run on them: every storage that the real code would allocate is counted. What
an attention kernel or an allocator keeps beside that is not in the count.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from marlhf.compiled import MULTIPLE
from marlhf.config import CONFIGS, Config, ConfigError, nearest, read_yaml
from marlhf.models import (
    _add_lora,
    _dtype,
    backbone_of,
    hidden_at,
    tiny_config,
    token_logprobs,
)
from marlhf.objectives import policy_loss, value_loss
from marlhf.placement import precision, set_precision

GIB = 2**30
PARTS = ("weights", "gradients", "optimizer", "activations", "key-value cache")


class Tracker(TorchDispatchMode):
    """Counts the bytes of the storages that tensor operations make, fake ones or real, while they
    live. `part` names what is made next; `peak` holds the parts of the largest total."""

    def __init__(self):
        super().__init__()
        self.part, self.now, self.peak = "activations", Counter(), Counter()
        self._known = weakref.WeakKeyDictionary()

    @contextlib.contextmanager
    def making(self, part: str) -> Iterator[None]:
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            part, size = self.part, storage.nbytes()
            self._known[storage] = size
            self.now[part] += size
            weakref.finalize(storage, self._freed, part, size)
            if self.now.total() > self.peak.total():
                self.peak = self.now.copy()

    def _freed(self, part: str, size: int) -> None:
        self.now[part] -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        return found


# Shapes


def known_models() -> dict[str, dict[str, Any]]:
    """configs/models.yaml: shapes of hub models, as their config.json have them."""
    return read_yaml(CONFIGS / "models.yaml")


def model_shape(config: Config) -> Any:
    """The transformers config of a preset's model: tiny, a folder's, or a known hub model's.

    Raises ConfigError for a hub model whose shape is not in configs/models.yaml.
    """
    from transformers import AutoConfig

    name = config.model.name
    if name == "tiny":
        return tiny_config(config.model, config.model.tiny.vocab, 0, 1)
    if Path(name).is_dir():
        return AutoConfig.from_pretrained(name)
    known = known_models()
    if name not in known:
        raise ConfigError(
            f"the shape of {name!r} is not known without a download: add it to "
            f"configs/models.yaml, or give a folder.{nearest(name, known)}"
        )
    shape = dict(known[name])
    return AutoConfig.for_model(shape.pop("model_type"), **shape)


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def parameters_of(shape: Any) -> int:
    """Parameters of the causal LM of a shape."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return parameters(AutoModelForCausalLM.from_config(copy.deepcopy(shape)))


# The count


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device by part (`PARTS`), in the update, and in sampling."""

    parameters: int
    trained: int
    update: dict[str, int]
    sampling: dict[str, int]

    @property
    def peak(self) -> int:
        return max(sum(self.update.values()), sum(self.sampling.values()))


def estimate(config: Config, processes: int = 1, shares: bool = False) -> Estimate:
    """The memory of PPO on each of `processes` devices, at the longest prompts and responses;
    `shares`: with a share of the weights on each (FSDP)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if shares:
        return _estimate_shares(config, processes)
    shape = model_shape(config)
    policy, critic, frozen = _structure(config, shape)
    with FakeTensorMode(), Tracker() as tracker:
        with tracker.making("weights"):
            for model in {id(m): m for m in (policy, critic, *frozen)}.values():
                _allocate(model)
            trained = {id(p): p for m in (policy, critic) for p in m.parameters()}.values()
            trained = [p for p in trained if p.requires_grad]
            if config.model.lora.rank:
                # the critic's adapter is trained as the policy's is, the reward model's is read
                critics = [torch.nn.Parameter(torch.empty_like(p)) for p in trained]
                frozen = [torch.empty_like(p) for p in trained if config.ppo.reward == "rm"]
                trained += critics
        weights = tracker.now.copy()
        with tracker.making("optimizer"):
            optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=False, foreach=False)
            for parameter in trained:
                optimizer.state[parameter] = {
                    name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")
                }
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: _is_gradient(tracker, p))
        if config.model.lora.rank:  # the pass below goes through one adapter twice
            with tracker.making("gradients"):
                for parameter in critics:
                    parameter.grad = torch.zeros_like(parameter)
        _update(config, policy, critic, processes)
        peak = tracker.peak
    if processes > 1:  # DDP sums gradients in buckets of its own
        peak["gradients"] *= 2
    size = parameters(policy)
    sampling = Counter(weights) + Counter(optimizer=tracker.now["optimizer"])
    # the policy's trained weights are cast once for all tokens, frozen ones layer by layer
    if config.model.autocast not in (None, config.model.dtype) and not config.model.lora.rank:
        sampling["weights"] += size * working_size(config)
    rows = rows_at_once(config, processes)
    sampling["key-value cache"] = rows * cache_bytes(shape, config)
    if config.ppo.sampling.compile:  # it is kept
        peak["key-value cache"] = sampling["key-value cache"]
    sampling["activations"] = 4 * rows * shape.get_text_config().vocab_size * 4  # next tokens
    del frozen
    return Estimate(
        parameters=size if config.model.lora.rank == 0 else size - _adapter_size(policy),
        trained=sum(p.numel() for p in trained),
        update={part: peak[part] for part in PARTS},
        sampling={part: sampling[part] for part in PARTS},
    )


def _estimate_shares(config: Config, processes: int) -> Estimate:
    """`estimate` with the weights in shares, as `marlhf.placement` has them: shares of weights,
    gradients and moments in model.dtype; beside them, in the products' precision, what is fetched.

    That is in the update two layers, and from its beginning to its end what stands outside of the
    layers (embeddings, norms, heads), whose gradient is whole in float32 before it is shared out;
    in sampling the policy.
    """
    size, own = working_size(config), _dtype(config.model.dtype).itemsize
    alike = copy.deepcopy(config)
    alike.model.dtype, alike.model.autocast = config.model.autocast or config.model.dtype, None
    found = estimate(alike, processes)
    policy, critic, frozen = _structure(config, model_shape(config))
    models = [backbone_of(model) for model in (policy, critic)]
    layer = max(parameters(each) for each in models[0].layers)
    trained = parameters(policy) + parameters(critic)
    outside = trained - sum(parameters(model.layers) for model in models)
    kept = own * (trained + sum(map(parameters, frozen))) // processes
    always = {"weights": kept, "gradients": 0, "optimizer": 2 * own * trained // processes}
    update = always | {part: found.update[part] for part in ("activations", "key-value cache")}
    update["weights"] += (outside + 2 * layer) * size
    update["gradients"] = own * trained // processes + max(outside, layer) * (size + 4)
    sampling = always | {part: found.sampling[part] for part in ("activations", "key-value cache")}
    sampling["weights"] += (parameters(models[0].layers) + outside) * size
    return Estimate(parameters(policy), trained, update, sampling)


def working_size(config: Config) -> int:
    """Bytes of a number in the precision of the products."""
    return _dtype(config.model.autocast or config.model.dtype).itemsize


def rows_at_once(config: Config, processes: int = 1) -> int:
    """The most prompts that a process samples at once, in a rollout or an evaluation."""
    rollout = config.ppo.batch // processes
    rollout = min(rollout, config.ppo.sampling.rows or rollout)
    return max(rollout, min(config.eval.batch, config.eval.prompts))


def cache_bytes(shape: Any, config: Config) -> int:
    """Keys and values of one row: prompt and response in every layer."""
    text = shape.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tokens = config.data.prompt_tokens + config.data.response_tokens
    if config.ppo.sampling.compile:
        tokens = -(-tokens // MULTIPLE) * MULTIPLE
    return 2 * text.num_hidden_layers * heads * size * tokens * working_size(config)


def _adapter_size(model) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


def _is_gradient(tracker: Tracker, parameter: torch.nn.Parameter) -> None:
    """A gradient was counted as an activation when the backward pass made it."""
    storage = parameter.grad.untyped_storage()
    if not getattr(storage, "_counted", False):
        storage._counted = True
        size = storage.nbytes()
        tracker.now["activations"] -= size
        tracker.now["gradients"] += size
        weakref.finalize(storage, tracker.now.update, {"activations": size, "gradients": -size})


def _structure(config: Config, shape: Any):
    """-> policy, critic and what is only read, on the meta device. With LoRA policy and critic are
    the same trunk."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    # flash attention needs its package, and keeps as little as sdpa
    attention = "eager" if config.model.attention == "eager" else "sdpa"
    kwargs = {"dtype": _dtype(config.model.dtype), "attn_implementation": attention}
    small, frozen = copy.deepcopy(shape), []
    small.num_labels = 1
    with torch.device("meta"):
        policy = critic = AutoModelForCausalLM.from_config(copy.deepcopy(shape), **kwargs)
        if config.model.lora.rank:
            policy = critic = _add_lora(policy, config.model, "CAUSAL_LM", 0)
        else:
            kinds = [AutoModelForSequenceClassification, AutoModelForCausalLM]
            if config.ppo.reward == "rm":
                kinds.append(AutoModelForSequenceClassification)
            critic, *frozen = [kind.from_config(copy.deepcopy(small), **kwargs) for kind in kinds]
    for each in (policy, critic):
        if config.model.gradient_checkpointing:
            each.activation_checkpointing_enable({"use_reentrant": False})
        each.train(config.model.gradient_checkpointing)
    set_precision(policy, config.model)
    if critic is not policy:
        set_precision(critic, config.model)
    for each in frozen:
        each.requires_grad_(False)
    return policy, critic, frozen


def _allocate(model: torch.nn.Module) -> None:
    """Gives a model on the meta device its weights; shared ones stay shared."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and id(old) not in made:
                new = torch.empty(old.shape, dtype=old.dtype)
                made[id(old)] = torch.nn.Parameter(new, requires_grad=old.requires_grad)
            module._parameters[name] = made.get(id(old))
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype)


def _update(config: Config, policy, critic, processes: int) -> None:
    """Forward and backward pass of a micro-batch, as `ActorCritic` and the trainer make it."""
    from marlhf.ppo import PARTS as forwards

    ppo = config.ppo
    rows = ppo.batch // ppo.minibatches // processes
    rows = min(rows, ppo.micro_batch or rows)
    whole = ppo.micro_batch is None and processes == 1
    size, sizes = -(-rows // forwards) if whole else rows, []
    while sum(sizes) < rows:
        sizes.append(min(size, rows - sum(sizes)))
    more = rows < ppo.batch // ppo.minibatches // processes
    for _ in range(1 + more):  # the second micro-batch meets the gradients of the first
        sum(_loss(config, policy, critic, rows) for rows in sizes).backward()


def _loss(config: Config, policy, critic, rows: int) -> torch.Tensor:
    data = config.data
    length, width = data.response_tokens, data.prompt_tokens + data.response_tokens - 1
    ids = torch.zeros(rows, width, dtype=torch.long)
    places = torch.zeros(rows * length, dtype=torch.long)
    tokens, mask = places.clone(), torch.ones(rows, length, dtype=torch.bool)
    top = config.ppo.sampling.top_k
    kept = None if top is None else torch.zeros(len(tokens), top, dtype=torch.long)
    with precision(policy):
        hidden = hidden_at(backbone_of(critic), ids, places)
        values = hidden.float().sum(-1).view(rows, length)
        hidden = hidden_at(backbone_of(policy), ids, places)
        logprobs, _ = token_logprobs(policy, hidden, tokens, 1.0, kept, entropy=True)
    old = torch.zeros(rows, length)
    loss = policy_loss(logprobs.view(rows, length), old, old, mask, denominator=1.0)
    return loss + value_loss(values, old, old, mask, denominator=1.0)
