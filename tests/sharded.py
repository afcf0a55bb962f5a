"""`python -m marlhf` with FSDP on a CPU, where accelerate does not offer it: `main` makes it.

Run by torchrun (tests/test_placement.py). STOP=<place> breaks the run there.
"""

import gc
import os
import sys

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from marlhf import cli, placement, supervised
from marlhf.ppo import PPOTrainer
from marlhf.trainer import StageTrainer


def shard_on_cpu() -> None:
    """What accelerate's state does for several accelerators, for several CPU processes."""
    real = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        real(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
    os.environ["ACCELERATE_USE_FSDP"] = "true"


def say(*words) -> None:
    """A line in one piece, whatever the other process prints."""
    sys.stdout.flush()
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def kept() -> int:
    """Bytes of all floating tensors that live in this process."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    tensors = [getattr(x, "_local_tensor", x) for x in tensors]
    storages = [x.untyped_storage() for x in tensors if x.is_floating_point()]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def watch() -> None:
    """Prints whether all weights are in shares, what a model at work finds instead, and the bytes
    kept before the first update and after each."""
    real_init, real_whole = PPOTrainer.__init__, placement._whole
    real_update = PPOTrainer.one_update

    def init(self, *args, **kwargs):
        real_init(self, *args, **kwargs)
        models = self.model, self.reference.model, self.reward.model
        weights = [weight for model in models for weight in model.parameters()]
        shared = all(isinstance(weight, DTensor) for weight in weights)
        say("SHARES", shared, {weight.dtype for weight in weights})
        say("KEPT", kept())

    def update(self, number):
        row = real_update(self, number)
        say("KEPT", kept())
        return row

    def whole(model, root):
        def seen():
            say("WHOLE", {(type(w) is DTensor, w.dtype) for w in model.parameters()})

        class Whole:
            def __enter__(self):
                self.inner = real_whole(model, root)
                self.inner.__enter__()
                seen()

            def __exit__(self, *error):
                self.inner.__exit__(*error)
                assert all(isinstance(w, DTensor) for w in model.parameters())

        return Whole()

    PPOTrainer.__init__, PPOTrainer.one_update, placement._whole = init, update, whole


def stop(place: str) -> None:
    """Breaks the run in the third step of SFT, after its last, or in the second PPO update."""

    def broken(*_, **__):
        raise RuntimeError("stopped here")

    def at(real, reached):
        def maybe(self, *args, **kwargs):
            return (broken if reached(self) else real)(self, *args, **kwargs)

        return maybe

    if place == "sft":
        step = StageTrainer.training_step
        StageTrainer.training_step = at(step, lambda trainer: trainer.state.global_step == 2)
    elif place == "after sft":
        supervised.sample = broken
    elif place == "ppo":
        PPOTrainer.one_update = at(PPOTrainer.one_update, lambda trainer: trainer.done == 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    shard_on_cpu()
    watch()
    stop(os.environ.get("STOP", ""))
    sys.exit(cli.main())
