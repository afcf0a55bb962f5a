"""Where a model's weights are while it works, and in what precision it multiplies.

Weights can be in shares, one a process (FSDP, by accelerate): a training step goes through the
module that accelerate wrapped, which fetches a layer when it comes to it. Whatever else calls a
model, or a part of one, does so within `running`, which fetches its weights for as long as that
takes; all processes must come to it together. In one process with float32 weights and
model.autocast off nothing here does anything.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from marlhf import processes
from marlhf.config import ModelConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

_ROOTS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def sharding() -> bool:
    """Whether the launcher asks for FSDP (configs/accelerate/fsdp.yaml), and for two processes or
    more: one holds all shares."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return asked and processes.world() > 1


# Precision


def set_precision(model: nn.Module, config: ModelConfig) -> None:
    """Notes model.autocast on a model: what `precision` reads there.

    What the layers hand on is in that precision too, as it is where shares are fetched in it: a
    cache of keys and values wants both of one dtype.
    """
    if config.autocast is None:
        return
    dtype = model.marlhf_autocast = getattr(torch, config.autocast)

    def cast(_, __, embedded):
        return embedded.to(dtype) if torch.is_autocast_enabled(embedded.device.type) else embedded

    model.get_input_embeddings().register_forward_hook(cast)


def working_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's products: that of its weights, unless model.autocast says."""
    autocast = getattr(model, "marlhf_autocast", None)
    return autocast or next(model.parameters()).dtype


@contextlib.contextmanager
def precision(model: nn.Module) -> Iterator[None]:
    """Within, the model's products are in its own precision (torch.autocast)."""
    dtype = getattr(model, "marlhf_autocast", None)
    if dtype is None:
        yield
        return
    with torch.autocast(model.device.type, dtype=dtype):
        yield


# Shares


def plugin_settings(config: ModelConfig) -> dict[str, Any] | None:
    """Settings of accelerate's FSDP plugin beside those of the launcher; None without FSDP.

    With model.autocast, weights are fetched in that precision, while the shares, the optimizer and
    the sums of gradients over processes are float32. Raises ValueError for LoRA, whose frozen trunk
    has another precision than its adapters.
    """
    if not sharding():
        return None
    if config.lora.rank:
        raise ValueError(
            "FSDP shares out weights that are all trained; with LoRA take DDP "
            "(configs/accelerate/ddp.yaml), or set model.lora.rank=0"
        )
    settings: dict[str, Any] = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap"}
    if config.autocast is not None:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        dtype = getattr(torch, config.autocast)
        settings["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32
        )
    return settings


def make_accelerator(config: ModelConfig) -> Accelerator:
    """accelerate's Accelerator for the processes that the launcher started."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    settings = plugin_settings(config)
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        step_scheduler_with_optimizer=False,
        fsdp_plugin=settings and FullyShardedDataParallelPlugin(**settings),
    )


def loading_device(device: torch.device) -> torch.device:
    """Where models are loaded: on the host if they will be shared out, as one of them need not
    fit the device."""
    return torch.device("cpu") if sharding() else device


def place(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A model that is only read, on the device: whole, or this process' share of it."""
    if not sharding():
        return model.to(accelerator.device)
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    model.requires_grad_(False)
    shared = fsdp2_prepare_model(accelerator, model)
    adopt(shared)
    return shared


def adopt(root: nn.Module) -> None:
    """Makes `running` know a module that accelerate shared out, and the models that it holds."""
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if not isinstance(root, FSDPModule) or root in _ROOTS:
        return
    for part in (root, *root.children()):
        _ROOTS[part] = weakref.ref(root)
    # a first pass through the root, so that its parts may be called without it
    root.marlhf_begin = lambda: None
    register_fsdp_forward_method(root, "marlhf_begin")
    with torch.no_grad():
        root.marlhf_begin()
    root.reshard()


@contextlib.contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Within, the model works outside its training step: weights whole, in its precision."""
    root = _ROOTS.get(model)
    with precision(model), _whole(model, root()) if root else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _whole(model: nn.Module, root: nn.Module) -> Iterator[None]:
    from torch.distributed.fsdp import FSDPModule

    units = [root, *(unit for unit in model.modules() if unit is not root)]
    units = [unit for unit in units if isinstance(unit, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not root, recurse=False)
            unit.reshard()


def whole_state(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """All weights of a model in shares, on the host of process 0 (empty elsewhere); None for a
    model that is whole as it is. All processes must call it together."""
    if model not in _ROOTS:
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    # shared weights come once under each of their names; a checkpoint holds the first alone
    for name in getattr(model, "all_tied_weights_keys", {}):
        state.pop(name, None)
    return state
