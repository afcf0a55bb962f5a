"""Small models of several architectures, with weights large enough that their outputs differ, and
three prompts and responses of unequal length."""

import torch
import transformers

from marlhf.models import pack
from marlhf.text import left_pad, right_pad

VOCAB, TOLERANCE = 60, 2e-5  # float32 sums in another order
SIZES = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA, **SIZES),
    "gemma": lambda: transformers.GemmaConfig(**LLAMA, head_dim=8, **SIZES),
    "gemma2": lambda: transformers.Gemma2Config(
        **LLAMA, head_dim=8, sliding_window=6, final_logit_softcapping=3.0, **SIZES
    ),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA, **SIZES),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **SIZES
    ),
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, **SIZES),
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]
RESPONSES = [[20, 21, 1], [22, 23, 24, 25, 26, 27, 1], [28]]


def make(arch, auto=transformers.AutoModelForCausalLM, **kwargs):
    torch.manual_seed(0)
    config = CONFIGS[arch]()
    for key, value in kwargs.items():
        setattr(config, key, value)
    model = auto.from_config(config)
    with torch.no_grad():  # at 0.02 all logits are nearly alike, and nothing is tested
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def scalar(arch):
    return make(arch, transformers.AutoModelForSequenceClassification, num_labels=1)


def packed(prompts=PROMPTS, responses=RESPONSES, pad=0):
    """-> ids [B, S], starts [B], tokens [B, T], mask [B, T]."""
    tokens, mask = right_pad(responses, pad)
    return *pack(*left_pad(prompts, pad), tokens, mask, pad), tokens, mask
