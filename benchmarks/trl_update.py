"""PPO updates by TRL 1.9.2's PPOTrainer, one for each line read on stdin.

Runs in TRL's own environment (requirements-trl.txt) and knows nothing of marlhf, so that what is
timed is TRL as it comes. The sizes arrive as JSON in the first argument; `bench_update.py` is the
one that starts this file, and its `SIZES` says what they are.

Protocol, a line each: "ready" is written once the warm-up updates are done; each "go" read is
answered by a JSON line {"wall": seconds, "cpu": seconds, "gc": seconds} for one whole update
(sampling, scoring, learning, metrics: all that lies between two `on_step_end`). "gc" is the part
of it that Python's garbage collector took, which the trainer calls twice an update; "memory", on a
GPU, the most bytes that its allocator held. The end of the input ends the process; nothing else
reaches stdout.

`bench_gpu.py` starts it too, with sizes that say more: kv_heads, head_dim, micro (rows in a forward
pass), gpu (bfloat16 products, gradient checkpointing, as ours there).

TRL is set as fast as its own options allow at these sizes: SDPA attention (eager is a tenth
slower, a static cache no faster), the whole batch in one rollout forward and in one learning
forward, no gradient checkpointing, no key-value cache in passes that do not sample, prompts of one
length (so no padding and no masks), fused AdamW, no evaluation samples, no saving, no reporting.
"""

import gc
import json
import os
import sys
import tempfile
import time
import warnings

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from transformers import (  # noqa: E402
    GemmaConfig,
    GemmaForCausalLM,
    GemmaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402

MAX_UPDATES = 1000  # far more than anyone asks for; the input ends the run


class Stopwatch(TrainerCallback):
    """Lets one update through for each "go" and writes what it took."""

    def __init__(self, warmup, talk):
        self.warmup, self.talk, self.started = warmup, talk, None
        self.collecting, self.collected = 0.0, 0.0
        gc.callbacks.append(self.on_collection)

    def on_collection(self, phase, info):
        now = time.perf_counter()
        if phase == "start":
            self.collecting = now
        else:
            self.collected += now - self.collecting

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < self.warmup:
            return
        if self.started is None:
            self.say("ready")
        else:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter(), time.process_time(), self.collected
            took = (b - a for a, b in zip(self.started, now, strict=True))
            row = dict(zip(("wall", "cpu", "gc"), took, strict=True))
            if torch.cuda.is_available():
                row["memory"] = torch.cuda.max_memory_allocated()
            self.say(json.dumps(row))
        if sys.stdin.readline().strip() != "go":
            sys.exit(0)
        self.started = time.perf_counter(), time.process_time(), self.collected

    def say(self, line):
        print(line, file=self.talk, flush=True)


def gemma(kind, sizes, pad, **extra):
    """A Gemma-shaped model with random weights; `extra` goes to its config."""
    config = GemmaConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["ff"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes.get("kv_heads", sizes["heads"]),
        head_dim=sizes.get("head_dim", sizes["hidden"] // sizes["heads"]),
        max_position_embeddings=2048,
        initializer_range=sizes["hidden"] ** -0.5,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        attn_implementation="sdpa",
        **extra,
    )
    model = kind(config)
    if kind is GemmaForCausalLM:
        model.generation_config.use_cache = True  # sampling does use the cache
        model.generation_config.pad_token_id = pad
    return model


def build_trainer(sizes, callback, folder):
    """TRL's PPOTrainer at `sizes`: random models, random prompts of one length, no stop token."""
    torch.manual_seed(0)
    pad = sizes["vocab"]  # an id that the policy cannot sample, so all response tokens count
    words = {f"w{i}": i for i in range(sizes["vocab"])} | {"<pad>": pad, "<eos>": pad + 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    prompts = torch.randint(sizes["vocab"], (sizes["batch"] * 4, sizes["prompt"]))
    gpu, micro = sizes.get("gpu", False), sizes.get("micro", sizes["batch"])
    config = PPOConfig(
        output_dir=folder,
        use_cpu=not gpu,
        bf16=gpu,
        gradient_checkpointing=gpu,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=sizes["batch"] // micro,
        num_mini_batches=1,
        num_ppo_epochs=1,
        local_rollout_forward_batch_size=micro,
        total_episodes=sizes["batch"] * MAX_UPDATES,
        response_length=sizes["response"],
        stop_token=None,
        temperature=sizes["temperature"],
        kl_coef=0.05,
        learning_rate=3e-4,
        num_sample_generations=0,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    policy = gemma(GemmaForCausalLM, sizes, pad)
    reference = gemma(GemmaForCausalLM, sizes, pad)
    reference.load_state_dict(policy.state_dict())
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference.eval(),
        reward_model=gemma(GemmaForSequenceClassification, sizes, pad, num_labels=1).eval(),
        value_model=gemma(GemmaForSequenceClassification, sizes, pad, num_labels=1),
        train_dataset=Dataset.from_dict({"input_ids": prompts.tolist()}),
        data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
        callbacks=[callback],
    )


def main():
    sizes = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    talk = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what TRL prints goes to stderr; stdout carries the protocol alone
    with tempfile.TemporaryDirectory() as folder:
        build_trainer(sizes, Stopwatch(sizes["warmup"], talk), folder).train()


if __name__ == "__main__":
    main()
