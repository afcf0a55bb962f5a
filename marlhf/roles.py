"""The four models of PPO: policy, critic, reference and reward model (Sec. 4.1).

With all weights trained each has weights of its own. With LoRA there is one frozen trunk, the SFT
model, in memory: policy, critic and reward model are an adapter each (the last two with a head),
and the reference is the trunk with none. That takes a reward model which was trained as an adapter
of the same SFT model; another one keeps its weights, and the critic starts from those.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from marlhf.config import Config, PPOConfig
from marlhf.models import ActorCritic, Reference, is_lora, load_policy, load_scalar
from marlhf.rewards import RewardModel, TrueScore
from marlhf.tasks import get_task

ADAPTER = "adapter"  # a reward model's folder holds its adapter in a folder of this name
BASE = "base.json"  # in it: the digest of the weights that the adapter was trained on


@dataclass
class Roles:
    """`actor` holds policy and critic; `reward` scores texts."""

    actor: ActorCritic
    reference: Reference
    reward: RewardModel | TrueScore


def make_roles(config: Config, tokenizer, sft: str | Path, rm: str | Path | None, device) -> Roles:
    """From the models `sft` and `rm` (folders or hub names; None where the task scores itself).

    Raises ValueError where the settings need a reward model and there is none.
    """
    ppo, model, seed = config.ppo, config.model, config.seed
    if rm is None:
        if ppo.reward == "rm":
            raise ValueError("ppo.reward=rm needs a reward model: give one, or set ppo.reward=task")
        if ppo.critic_init == "rm":
            raise ValueError("ppo.critic_init=rm needs a reward model: set it to policy or zero")
    policy = load_policy(model, tokenizer, sft, seed)
    if is_lora(policy) and (rm is None or on_trunk(rm, sft)):
        roles = _on_one_trunk(config, tokenizer, policy, rm)
    else:
        reward = _task_score(config) or RewardModel.load(rm, config)
        kind = ppo.critic_init
        critic = load_scalar(
            model, tokenizer, rm if kind == "rm" else sft, zero_head=kind == "zero", seed=seed
        )
        actor = ActorCritic(policy, critic, *_value_scale(config, rm))
        roles = Roles(actor.to(device), Reference(policy), reward)
    disable_dropout(roles.actor)
    roles.actor.to(device).train(model.gradient_checkpointing)  # which works in this mode alone
    if isinstance(roles.reward, RewardModel):
        roles.reward.model.to(device)
    return roles


def disable_dropout(module: nn.Module) -> None:
    """Every dropout to 0: the learner must see the policy that was sampled from."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name, value in vars(part).items():
            if "dropout" in name and isinstance(value, float):
                setattr(part, name, 0.0)


def make_optimizer(actor: ActorCritic, ppo: PPOConfig):
    """AdamW with one group for the policy and one for the critic, and its schedule."""
    from transformers import get_scheduler

    groups = actor.parameter_groups(ppo.lr, ppo.critic_lr, ppo.weight_decay)
    optimizer, steps = torch.optim.AdamW(groups, fused=True), ppo.passes * ppo.minibatches
    scheduler = get_scheduler(
        {"constant": "constant_with_warmup"}.get(ppo.schedule, ppo.schedule),
        optimizer,
        num_warmup_steps=ppo.warmup * steps,
        num_training_steps=ppo.updates * steps,
    )
    return optimizer, scheduler


def _value_scale(config: Config, rm) -> tuple[float, float]:
    """Shift and scale of the values: a critic from the reward model starts on the scale of the
    standardised score."""
    if config.ppo.critic_init != "rm":
        return 0.0, 1.0
    known = {"mean": 0.0, "std": 1.0} | RewardModel.scale(rm)
    return -known["mean"] / known["std"], 1.0 / known["std"]


def _task_score(config: Config) -> TrueScore | None:
    return TrueScore(get_task(config.data.task)) if config.ppo.reward == "task" else None


# One trunk


@contextmanager
def adapters(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within, these adapters of the trunk are at work and no others; what is trained stays so
    (peft's own switches freeze the adapters that they turn off)."""
    layers = _tuned(module)
    before = [layer.active_adapters for layer in layers]
    for layer in layers:
        layer._active_adapter = list(names)
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


def _tuned(module: nn.Module) -> list[nn.Module]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [part for part in module.modules() if isinstance(part, BaseTunerLayer)]


class _Adapted:
    """The trunk's transformer, called with some of its adapters at work."""

    def __init__(self, backbone: nn.Module, names: Sequence[str]):
        self.module, self.names = backbone, tuple(names)

    def __call__(self, *args, **kwargs):
        with adapters(self.module, self.names):
            return self.module(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.module, name)


class _Head(nn.Linear):
    """A score in float32, whatever the trunk's precision."""

    def forward(self, hidden):
        return super().forward(hidden.to(self.weight.dtype))


class Role(nn.Module):
    """A model on the trunk, as transformers' own look to `marlhf.models`: `adapter` is its
    adapter's name (None: the bare trunk), `head` its score. Of the trunk it owns nothing."""

    base_model_prefix = "backbone"

    def __init__(self, trunk, adapter: str | None = None, head: nn.Module | None = None):
        super().__init__()
        inner = trunk.get_base_model()
        self.adapter, self.config = adapter, inner.config
        self.marlhf_autocast = getattr(trunk, "marlhf_autocast", None)
        backbone = getattr(inner, inner.base_model_prefix)
        self.backbone = _Adapted(backbone, [adapter] if adapter else [])
        self._output = (inner.get_output_embeddings(),)
        self.score = head

    def get_output_embeddings(self):
        return self._output[0]

    @property
    def device(self):
        return self._output[0].weight.device

    def weights(self) -> list[nn.Parameter]:
        """Those of its adapter and its head."""
        named = self.backbone.module.named_parameters()
        return [p for n, p in named if f".{self.adapter}." in n] + list(self.score.parameters())

    def merged(self) -> nn.Module:
        """A transformers classifier of its own, the adapter added to a copy of the trunk."""
        from transformers import AutoModelForSequenceClassification

        config = copy.deepcopy(self.config)
        config.num_labels = 1
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        backbone = copy.deepcopy(self.backbone.module)
        for part in list(backbone.modules()):
            for name, child in list(part.named_children()):
                if hasattr(child, "get_base_layer"):
                    child.merge(adapter_names=[self.adapter])
                    setattr(part, name, child.get_base_layer())
        setattr(model, model.base_model_prefix, backbone)
        dtype = next(backbone.parameters()).dtype
        model.score = copy.deepcopy(self.score).to(dtype)
        return model


def merged_critic(actor: ActorCritic) -> nn.Module:
    """The critic as a model of its own, to be saved."""
    return actor.critic.merged() if isinstance(actor.critic, Role) else actor.critic


class _TrunkActorCritic(ActorCritic):
    def parameter_groups(self, lr: float, critic_lr: float, weight_decay: float) -> list[dict]:
        critic = self.critic.weights()
        others = {id(p) for p in critic}
        policy = [p for p in self.policy.parameters() if p.requires_grad and id(p) not in others]
        return [
            {"params": params, "lr": rate, "weight_decay": weight_decay}
            for params, rate in ((policy, lr), (critic, critic_lr))
        ]


class _TrunkReference(Reference):
    def __init__(self, trunk):
        self.model = Role(trunk)


def _on_one_trunk(config: Config, tokenizer, policy, rm) -> Roles:
    ppo, model = config.ppo, config.model
    inner = policy.get_base_model()
    width = inner.config.get_text_config().hidden_size
    if inner.config.get_text_config().pad_token_id is None:
        inner.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    generator = torch.Generator().manual_seed(config.seed)
    head = _Head(width, 1, bias=False)
    spread = 0.0 if ppo.critic_init == "zero" else inner.config.get_text_config().initializer_range
    with torch.no_grad():
        head.weight.normal_(0.0, spread, generator=generator)
    reward = _task_score(config)
    if rm is not None:
        settings, state, weight = _read_adapter(Path(rm) / ADAPTER)
    if reward is None:
        scorer = Role(policy, "reward", _Head(width, 1, bias=False))
        _add(policy, scorer, settings, state, weight)
        for parameter in scorer.weights():
            parameter.requires_grad_(False)
        reward = RewardModel.around(scorer, rm, config)
    critic = Role(policy, "critic", head)
    if ppo.critic_init == "rm":
        _add(policy, critic, settings, state, weight)
    else:
        torch.manual_seed(config.seed + 1)
        _add(policy, critic, policy.peft_config["default"])
    for parameter in critic.weights():
        parameter.requires_grad_(True)
    if model.gradient_checkpointing:
        # a layer run again in the backward pass must see the adapter that it was first run with
        backbone = critic.backbone.module

        def same_adapter():
            names = _tuned(backbone)[0].active_adapters
            return nullcontext(), adapters(backbone, names)

        inner.activation_checkpointing_enable({"use_reentrant": False, "context_fn": same_adapter})
    actor = _TrunkActorCritic(policy, critic, *_value_scale(config, rm))
    return Roles(actor, _TrunkReference(policy), reward)


def _add(policy, role: Role, settings, state=None, weight=None) -> None:
    """The role's adapter, new or with the weights of `state`, and its head's `weight`."""
    from peft import set_peft_model_state_dict

    settings = copy.deepcopy(settings)
    settings.modules_to_save, settings.task_type = None, "CAUSAL_LM"
    settings.inference_mode = False
    trained = [p for p in policy.parameters() if p.requires_grad]
    policy.add_adapter(role.adapter, settings)
    policy.set_adapter("default")
    for parameter in trained:
        parameter.requires_grad_(True)
    if state is not None:
        set_peft_model_state_dict(policy, state, adapter_name=role.adapter)
        with torch.no_grad():
            role.score.weight.copy_(weight)


# A reward model's adapter on the disk


def weights_digest(folder: str | Path) -> str | None:
    """Hash of the weights in a folder; None where there are none (a hub name)."""
    digest, files = hashlib.sha256(), sorted(Path(folder).glob("*.safetensors"))
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else None


def save_adapter(model, folder: str | Path, base: str | Path) -> None:
    """The LoRA adapter and head of a reward model beside its merged weights in `folder`, with the
    digest of the weights at `base` that it stands on. Nothing without LoRA."""
    if is_lora(model):
        where = Path(folder) / ADAPTER
        model.save_pretrained(where)
        (where / BASE).write_text(json.dumps({"sha256": weights_digest(base)}) + "\n")


def on_trunk(rm: str | Path, sft: str | Path) -> bool:
    """Whether the reward model is an adapter of exactly these SFT weights."""
    base = Path(rm) / ADAPTER / BASE
    if not base.is_file():
        return False
    found = weights_digest(sft)
    return found is not None and json.loads(base.read_text())["sha256"] == found


def _read_adapter(folder: Path):
    """-> its settings, its weights, the weight of its head."""
    from peft import PeftConfig
    from safetensors.torch import load_file

    state = load_file(folder / "adapter_model.safetensors")
    heads = [name for name in state if name.endswith("score.weight")]
    return PeftConfig.from_pretrained(folder), state, state.pop(heads[0])
