"""Runs side by side: a process each, one thread a process, as many as there are cores or GPUs."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from marlhf import processes
from marlhf.config import CONFIGS, Config, read_yaml
from marlhf.plans import require_fit
from marlhf.runs import Run
from marlhf.stages import Spec, compute, with_parents

# A worker computes with one thread: two such processes do twice the work of one with two threads.
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


class RunFailed(RuntimeError):
    """A run did not finish; the message names it, its folder and the cause."""


@functools.cache
def ledger() -> dict[str, Any]:
    """configs/ledger.yaml: measured minutes of one run, by preset and stage."""
    return read_yaml(CONFIGS / "ledger.yaml")


def minutes(spec: Spec) -> float | None:
    """Minutes that a run is expected to take on one thread; None where it was not measured.

    The ledger may give an arm its own figure, under <stage>/<arm>, and another width of the tiny
    model, under <stage>/hidden<width>. Its figure for repeated samples is that of 1000 responses.
    """
    if spec.given:
        return 0.0
    preset = ledger()["minutes"].get(spec.config.name, {})
    width = f"{spec.stage}/hidden{spec.config.model.tiny.hidden}"
    keys = (f"{spec.stage}/{spec.arm}", width, spec.stage)
    found = next((preset[key] for key in keys if key in preset), None)
    if found is None or spec.stage != "eval":
        return found
    return found * _responses(spec.config) / 1000


def _responses(config: Config) -> int:
    """Responses of repeated samples: at temperature 0 there is one a prompt."""
    repeat = config.repeat
    temperatures = repeat.temperatures or [config.ppo.sampling.temperature]
    numbers = sum(repeat.samples if temperature else 1 for temperature in temperatures)
    return numbers * (repeat.prompts or config.eval.prompts)


class _Progress:
    """A bar of expected minutes over all runs, moved by the live runs' progress.json."""

    def __init__(self, order: Sequence[Spec], todo: Sequence[Spec], shown: bool):
        from tqdm import tqdm

        self.weights = {spec.hash: minutes(spec) or 1.0 for spec in todo}
        self.left, self.shown = set(self.weights), shown and bool(todo)
        if self.shown:
            print(f"{len(todo)} runs to do, {len(order) - len(todo)} done already", file=sys.stderr)
        self.bar = tqdm(
            total=sum(self.weights.values()),
            file=sys.stderr,
            disable=not self.shown,
            mininterval=0.5 if sys.stderr.isatty() else 60,
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}",
        )

    def update(self, live: Iterable[Spec]) -> None:
        part, names = 0.0, []
        for spec in live:
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                row = json.loads((spec.folder / "progress.json").read_text())
                part += self.weights[spec.hash] * min(1.0, row["done"] / row["total"])
            names.append(spec.title)
        whole = sum(w for h, w in self.weights.items() if h not in self.left)
        runs = len(self.weights)
        self.bar.set_description(f"{runs - len(self.left)}/{runs} runs", refresh=False)
        self.bar.set_postfix_str(", ".join(names), refresh=False)
        self.bar.update(max(0.0, whole + part - self.bar.n))

    def finished(self, spec: Spec) -> None:
        self.left.discard(spec.hash)
        if self.shown:
            took = spec.run.manifest["wall_seconds"] / 60
            self.bar.write(f"{spec.title}  {took:.1f} min", file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


def _run_here(todo: Sequence[Spec], threads: int, progress: _Progress) -> None:
    """One after another in this process; a thread moves the bar."""
    for spec in todo:
        stop = threading.Event()

        def watch(spec: Spec = spec, stop: threading.Event = stop) -> None:
            while not stop.wait(0.5):
                progress.update([spec])

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            compute(spec, threads)
        except Exception as error:
            error.add_note(f"(run {spec.title} in {spec.folder})")
            raise
        finally:
            stop.set()
            watcher.join()
        progress.finished(spec)


def _start_worker(devices: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C stops

    def die_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices.get()


def _work(spec: Spec) -> str | None:
    """Runs a spec in a worker; the cause where it fails (exceptions may not survive pickling)."""
    try:
        compute(spec)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _devices() -> list[str]:
    """GPUs to share out, a worker each, without waking CUDA in this process."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


@contextlib.contextmanager
def _pool(workers: int, devices: list[str]) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Worker processes; on Ctrl-C or an error in here they are ended (their runs resume)."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue() if devices else None
    for device in devices:
        queue.put(device)
    others = set(multiprocessing.active_children())
    with _environment(WORKER_ENVIRONMENT):
        pool = concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=context, initializer=_start_worker, initargs=(queue,)
        )
        try:
            yield pool
        except BaseException:
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _run_side_by_side(todo: Sequence[Spec], workers: int, progress: _Progress) -> dict[str, str]:
    """Runs what is to do, children after parents; the causes of failure by hash."""
    devices = _devices()
    waiting = {spec.hash: spec for spec in todo}
    live: dict[concurrent.futures.Future, Spec] = {}
    failed: dict[str, str] = {}
    with _pool(workers, devices[:workers]) as pool:
        while waiting or live:
            for spec in list(waiting.values()):
                needs = {parent.hash for parent in spec.parents.values()}
                if needs & failed.keys():
                    failed[spec.hash] = ""  # not started: the cause is its parent's
                    del waiting[spec.hash]
                elif len(live) < workers and not needs & (
                    waiting.keys() | {s.hash for s in live.values()}
                ):
                    live[pool.submit(_work, waiting.pop(spec.hash))] = spec
            done, _ = concurrent.futures.wait(
                live, timeout=0.5, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                spec = live.pop(future)
                try:
                    cause = future.result()
                except BrokenProcessPool:
                    names = ", ".join(s.title for s in (spec, *live.values()))
                    raise RunFailed(
                        f"a worker was killed (out of memory?) among those that ran {names}; what "
                        "is finished is kept: run again, perhaps with fewer workers"
                    ) from None
                if cause is None:
                    progress.finished(spec)
                else:
                    failed[spec.hash] = cause
            progress.update(live.values())
    return failed


def workers_available() -> int:
    """GPUs, or else the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(_devices()) or len(os.sched_getaffinity(0))
    return len(_devices()) or os.cpu_count() or 1


def execute(
    specs: Sequence[Spec], workers: int | None = None, progress: bool = True, threads: int = 1
) -> list[Run]:
    """The finished runs of the specs, in their order; those they need are run first, finished
    ones are found, killed ones go on from their last checkpoint.

    `workers` processes side by side, by default as many as there are GPUs or cores; 0 runs all in
    this process, with `threads` threads. When a run fails, those that do not need it still finish;
    then RunFailed says which, where, and why. From a script, call it under
    `if __name__ == "__main__":`, since workers import the script.
    """
    order = with_parents(specs)
    found = processes.share({spec.hash for spec in order if spec.finished})
    todo = [spec for spec in order if spec.hash not in found]
    for config in {str(s.config.model): s.config for s in todo if s.stage == "ppo"}.values():
        require_fit(config)
    bar = _Progress(order, todo, progress and processes.main())
    try:
        if todo and (workers == 0 or processes.world() > 1):  # all processes share each run
            _run_here(todo, threads, bar)
        elif todo:
            count = min(workers or workers_available(), len(todo))
            _raise_failed(todo, _run_side_by_side(todo, count, bar))
    finally:
        bar.close()
    return [spec.run for spec in specs]


def _raise_failed(todo: Sequence[Spec], failed: Mapping[str, str]) -> None:
    causes = [(spec, failed[spec.hash]) for spec in todo if failed.get(spec.hash)]
    if causes:
        spec, cause = causes[0]
        more = f"; so did {', '.join(s.title for s, _ in causes[1:])}" if causes[1:] else ""
        skipped = len(failed) - len(causes)
        after = f"; {skipped} that need it were not started" if skipped else ""
        raise RunFailed(
            f"{spec.title} failed: {cause} (folder {spec.folder}, traceback in error.txt){more}"
            f"{after}"
        )
