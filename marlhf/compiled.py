"""The decoding step compiled (ppo.sampling.compile): CUDA graphs on a GPU."""

import functools
import weakref

import torch

from marlhf.placement import sharding
from marlhf.sampling import attention_of, decoding_step

COMPILER = {"mode": "reduce-overhead"}  # of torch.compile: CUDA graphs, where there is a GPU
MULTIPLE = 128  # a kept cache's length, so that few shapes are compiled
_CACHES = weakref.WeakKeyDictionary()  # model -> (rows, length, its static cache)


def _masked_step(model, tokens, attend, position, cache):
    """`decoding_step` where all layers attend to the same of the cache's places, ``[B, L]``."""
    seen = attend[:, None, None, :]
    if attention_of(model.config) == "eager":
        kind = cache.layers[0].keys.dtype
        seen = torch.zeros_like(seen, dtype=kind).masked_fill(~seen, torch.finfo(kind).min)
    return decoding_step(model, tokens, seen, position, cache)


@functools.cache
def _compiled():
    return torch.compile(_masked_step, fullgraph=True, dynamic=False, **COMPILER)


def compiled_step(model, tokens, attend, position, cache):
    """`_masked_step`, compiled once for each shape and kind of model; its result lives a step.

    ValueError, with the compiler's reason, for a model whose step cannot be compiled.
    """
    torch.compiler.cudagraph_mark_step_begin()
    try:
        # 8 would be few for the shapes of rollouts and evaluations, over which it is an error
        with torch._dynamo.config.patch(recompile_limit=64):
            # a copy: a column's address is not aligned as the compiled code wants it
            return _compiled()(model, tokens.clone(), attend, position, cache)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"the decoding step of {type(model).__name__} cannot be compiled: {reason}; set "
            "ppo.sampling.compile=false"
        ) from error


def kept_cache(model, rows: int, length: int):
    """The model's static cache, emptied: made anew only for other rows or a greater length.

    CUDA graphs are bound to its address, so it lives as long as the model. -> cache, its length.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    if sharding():
        raise ValueError(
            "ppo.sampling.compile: not with weights in shares (FSDP), which are elsewhere in each "
            "rollout; set it to false"
        )
    old_rows, old_length, cache = _CACHES.get(model, (0, 0, None))
    if old_rows != rows or old_length < length:
        _CACHES.pop(model, None)
        cache = None  # before the new one is made
        length = max(old_length, -(-length // MULTIPLE) * MULTIPLE)
        text = model.config.get_text_config()
        window = getattr(text, "sliding_window", None) or length
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        if attention_of(model.config) not in ("sdpa", "eager"):
            raise ValueError(
                f"ppo.sampling.compile: not with model.attention={attention_of(model.config)}; set "
                "it to sdpa"
            )
        if kinds - {"full_attention", "sliding_attention"} or window < length:
            raise ValueError(
                f"ppo.sampling.compile: {type(model).__name__} has layers that do not attend to "
                f"all of {length} tokens ({', '.join(sorted(kinds))}; window {window}): set it to "
                "false"
            )
        cache = StaticCache(config=model.config, max_cache_len=length)
        # a window that is never full: without it the step is the same for every token
        cache.layers = [
            StaticLayer(max_cache_len=length) if layer.is_sliding else layer
            for layer in cache.layers
        ]
        _CACHES[model] = rows, length, cache
    else:
        length = old_length
    cache.reset()
    return cache, length
