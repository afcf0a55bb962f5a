"""What one GPU does: sampling, one update by part, its memory, macro-GAE; random weights.

    python -m benchmarks.bench_gpu [--out results/gpu/NAME.json]      gemma-2b's shape, minutes
    python -m benchmarks.bench_gpu --trl PYTHON ...                   TRL's PPOTrainer beside it
    python -m benchmarks.bench_gpu --toy                              two layers, a CPU, seconds

Nothing is downloaded. Policy, critic, reference and reward model are LoRA roles on one bfloat16
trunk; then sampling alone with the decoding step compiled; then all weights, float32 with bfloat16
products, where `marlhf plan` says that they fit. Prompts and responses
have full length (the end token is never met). Each part is timed on its own, after one update that
is not counted, between synchronisations; memory is the allocator's peak within the part.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from marlhf.config import load_config
from marlhf.identity import device_name, versions
from marlhf.macro import macro_gae
from marlhf.memory import GIB, estimate, known_models
from marlhf.models import load_scalar, save_model
from marlhf.plans import device_memory
from marlhf.ppo import PPOTrainer
from marlhf.rewards import RewardModel
from marlhf.roles import save_adapter
from marlhf.segment import FixedNgram
from marlhf.tasks.base import TaskData
from marlhf.text import Example, Prompt

SHAPE = "google/gemma-2b"
SIZES = {"batch": 64, "prompt": 512, "response": 512, "micro": 8, "rank": 64, "updates": 3}
TOY = {"batch": 4, "prompt": 16, "response": 12, "micro": 2, "rank": 4, "updates": 2}
TOY_SHAPE = {
    "vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 128,
}  # fmt: skip
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def synchronise() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(action, repeats: int = 10) -> float:
    action()
    times = []
    for _ in range(repeats):
        start = synchronise()
        action()
        times.append(synchronise() - start)
    return statistics.median(times)


def settings(sizes: dict, folder: Path, lora: bool):
    return load_config(
        "tldr-gemma-2b",
        {
            "data.task": "pairs",  # prompts without a true score
            "data.prompt_tokens": sizes["prompt"],
            "data.response_tokens": sizes["response"],
            "model.name": str(folder / "sft"),
            "model.dtype": "bfloat16" if lora else "float32",
            "model.lora.rank": sizes["rank"] if lora else 0,
            "ppo.batch": sizes["batch"],
            "ppo.micro_batch": sizes["micro"],
            "ppo.warmup": 0,
            "ppo.sampling.top_k": None,
            "eval.batch": sizes["batch"],
        },
    )


def make_models(shape: dict, sizes: dict, folder: Path) -> None:
    """Policy and reward model with random weights, and a tokenizer of one word a token."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(shape["vocab_size"] - 2))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"
    )
    config = AutoConfig.for_model("gemma", pad_token_id=0, eos_token_id=1, **shape)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    save_model(model, tokenizer, folder / "sft")
    del model
    lora = settings(sizes, folder, lora=True)
    scalar = load_scalar(lora.model, tokenizer, folder / "sft")
    scorer = RewardModel(scalar, tokenizer, sizes["prompt"], sizes["response"])
    scorer.save(folder / "rm")
    save_adapter(scalar, folder / "rm", folder / "sft")


def make_trainer(config, folder: Path, sizes: dict, vocab: int) -> PPOTrainer:
    numbers = torch.randint(vocab - 2, (sizes["batch"], sizes["prompt"])).tolist()
    prompts = [Prompt("", " ".join(f"w{n}" for n in row), "") for row in numbers]
    examples = [Example(str(i), prompt, "", {}) for i, prompt in enumerate(prompts)]
    data = TaskData([], [], examples, [], [], {}, "")
    trainer = PPOTrainer(config, data, folder / "sft", folder / "rm")
    trainer.tokenizer.eos_token = None  # the sampler stops at nothing
    return trainer


def measure_update(trainer: PPOTrainer, sizes: dict) -> dict:
    """Median seconds and largest memory of each part of an update."""
    seconds, memory, state = {}, {}, {}
    steps = {
        "sampling": lambda u: state.update(rollout=trainer.rollout(u)),
        "scoring": lambda u: trainer.score(state["rollout"]),
        "advantages": lambda u: state.update(found=trainer.advantages(state["rollout"])),
        "learning": lambda u: trainer.update(state["rollout"], state["found"]),
    }
    for update in range(1 + sizes["updates"]):
        for name, step in steps.items():
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            start = synchronise()
            step(update)
            took = synchronise() - start
            if update:
                seconds.setdefault(name, []).append(took)
            if GPU:
                memory[name] = max(memory.get(name, 0), torch.cuda.max_memory_allocated())
    tokens = int(state["rollout"].mask.sum())
    assert tokens == sizes["batch"] * sizes["response"], "a response ended early"
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "seconds": median | {"update": sum(median.values())},
        "peak_gib": {name: size / GIB for name, size in memory.items()},
        "sampled_tokens_per_second": tokens / median["sampling"],
        "estimated_gib": estimate(trainer.config).peak / GIB,
    }


def measure_sampling(trainer: PPOTrainer, sizes: dict) -> dict:
    """Sampling alone: the first rollout, which compiles, and the median of those after it."""
    times = []
    for update in range(1 + sizes["updates"]):
        start = synchronise()
        trainer.rollout(update)
        times.append(synchronise() - start)
    tokens = sizes["batch"] * sizes["response"]
    median = statistics.median(times[1:])
    return {"first_seconds": times[0], "sampled_tokens_per_second": tokens / median}


def measure_trl(python: Path, shape: dict, sizes: dict) -> dict:
    """TRL 1.9.2's PPOTrainer, all weights, in the environment of requirements-trl.txt: the same
    shape, batch, lengths and micro-batches; on a GPU bfloat16 products and checkpointing as ours.
    """
    from benchmarks.bench_update import Trl

    names = {
        "vocab": "vocab_size", "hidden": "hidden_size", "ff": "intermediate_size",
        "layers": "num_hidden_layers", "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    }  # fmt: skip
    wanted = {name: shape[key] for name, key in names.items()}
    wanted |= {name: sizes[name] for name in ("batch", "prompt", "response", "micro")}
    wanted |= {"temperature": 0.8, "gpu": GPU, "warmup": 1}
    try:
        trl = Trl(python, wanted)
        rows = [trl.update() for _ in range(sizes["updates"])]
    except SystemExit as error:  # it does not fit, or TRL is not there
        return {"not run": str(error).strip().splitlines()[-1]}
    trl.close()
    found = {"seconds": {"update": statistics.median(row["wall"] for row in rows)}}
    if GPU:
        found["peak_gib"] = max(row["memory"] for row in rows) / GIB
    return found


def limits(toy: bool) -> dict:
    """Rate of bfloat16 products, and of a copy (bytes read and written)."""
    size, length = (256, 2**20) if toy else (8192, 2**28)
    left = torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE)
    source = torch.zeros(length, device=DEVICE)
    target = torch.empty_like(source)
    return {
        "bfloat16_tflops": 2 * size**3 / median_seconds(lambda: left @ left) / 1e12,
        "copy_gb_per_second": 8 * length / median_seconds(lambda: target.copy_(source)) / 1e9,
    }


def measure_macro_gae(toy: bool) -> dict:
    """macro_gae at n = 5 on [4096, 2048] against a copy of one such tensor."""
    shape = (64, 128) if toy else (4096, 2048)
    rewards, values = torch.randn(2, *shape, device=DEVICE)
    mask = torch.ones(shape, dtype=torch.bool, device=DEVICE)
    segments = FixedNgram(5)(mask.long(), mask)
    took = median_seconds(lambda: macro_gae(rewards, values, segments))
    copy = median_seconds(rewards.clone)
    return {"shape": list(shape), "seconds": took, "copies": took / copy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="toy sizes, to try it on a CPU")
    parser.add_argument("--trl", type=Path, metavar="PYTHON", help="python of TRL's environment")
    parser.add_argument("--out", metavar="FILE", help="where the numbers go, as JSON")
    args = parser.parse_args()
    if not (GPU or args.toy):
        raise SystemExit("bench_gpu needs a GPU; --toy tries it on a CPU, and measures nothing")
    torch.manual_seed(0)
    sizes = TOY if args.toy else SIZES
    shape = dict(TOY_SHAPE if args.toy else known_models()[SHAPE])
    shape.pop("model_type", None)
    found = {
        "device": device_name(),
        "toy": args.toy,
        "sizes": sizes,
        "shape": shape,
        "versions": versions(),
        "limits": limits(args.toy),
        "macro_gae": measure_macro_gae(args.toy),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(shape, sizes, folder)
        for kind in ("lora", "all weights"):
            config = settings(sizes, folder, lora=kind == "lora")
            need = estimate(config).peak
            if need > device_memory()[0]:
                found[kind] = f"not run: {need / GIB:.0f} GiB are needed"
                continue
            trainer = make_trainer(config, folder, sizes, shape["vocab_size"])
            found[kind] = measure_update(trainer, sizes)
            if kind == "lora":
                trainer.ppo.sampling.compile = True
                found["lora, compiled step"] = measure_sampling(trainer, sizes)
            del trainer
            if GPU:
                torch.cuda.empty_cache()
    if args.trl:
        found["TRL 1.9.2, all weights"] = measure_trl(args.trl, shape, sizes)
    text = json.dumps(found, indent=1) + "\n"
    print(text, end="")
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text)


if __name__ == "__main__":
    main()
