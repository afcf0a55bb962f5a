"""Several processes of one run, started by torchrun or `accelerate launch`; accelerate joins them.

Every process computes its share and process 0 alone writes. An error that one process meets where
the others go on is shared (`agree`) before they would wait for it: all of them raise it. Any other
error ends its process, and the launcher ends the rest.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def world() -> int:
    """Number of processes of this run; 1 unless a launcher started it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    """This process' number among them."""
    return int(os.environ.get("RANK", 0)) if world() > 1 else 0


def main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def _join() -> None:
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())


def gather(value: T) -> list[T]:
    """What each process holds (anything that pickles), in their order."""
    if world() == 1:
        return [value]
    from accelerate.utils import gather_object

    _join()
    return gather_object([value])


def share(value: T) -> T:
    """Process 0's value, in all of them."""
    if world() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _join()
    return broadcast_object_list([value])[0]


def everywhere(kind: type[Exception], message: str) -> Exception:
    """An error that all processes raise at the same point, so that one of them prints it."""
    error = kind(message)
    error.everywhere = True
    return error


def agree(error: Exception | None) -> None:
    """Raises in every process what went wrong in any, the first of them if several."""
    found = [e for e in gather(error and (type(error), str(error))) if e is not None]
    if found:
        raise everywhere(*found[0])


def statistics(rows: Sequence[dict[str, Any]], maxima: Sequence[str]) -> dict[str, float]:
    """Scalar tensors of micro-batches as numbers of the whole step: the sum over micro-batches,
    averaged over processes (a loss's shares, as its gradients are), or the largest of all."""
    import torch

    names = list(rows[0])
    table = torch.stack([torch.stack([row[name].float() for name in names]) for row in rows]).cpu()
    found = gather((table.sum(0), table.amax(0)))
    sums = torch.stack([sums for sums, _ in found]).mean(0)
    largest = torch.stack([largest for _, largest in found]).amax(0)
    return {n: float((largest if n in maxima else sums)[i]) for i, n in enumerate(names)}


def deal(items: Sequence[T]) -> Sequence[T]:
    """This process' share: every world-th item, from its rank on."""
    return items[rank() :: world()]


def undeal(shares: Sequence[Sequence[Any]]) -> list[Any]:
    """The items that `deal` gave out, in their first order."""
    whole: list[Any] = [None] * sum(len(share) for share in shares)
    for first, share in enumerate(shares):
        whole[first :: len(shares)] = share
    return whole
