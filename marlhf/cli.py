"""The command line: marlhf sft | rm | ppo | eval | run | push | plan | claims."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlhf import processes
from marlhf.config import KEYS, Config, ConfigError, Key, load_config, nearest, presets, to_dict

if TYPE_CHECKING:
    from marlhf.runs import Run

OVERVIEW = """\
Macro actions in RLHF (arXiv 2410.02743): SFT, reward model, PPO over macro actions.

A run is a folder under $MARLHF_RUNS (default ./runs), named by what it is and a hash of all that
can change its numbers. A finished run is found, not computed again; a killed one goes on from its
last checkpoint.
"""
EXAMPLES = """\
examples:
  marlhf ppo tldr-tiny                           SFT, reward model and MA-PPO of chain 0
  marlhf ppo tldr-tiny ppo.macro.n=10 --seed 1   n = 10, chain 1
  marlhf ppo tldr-small --data posts/ --model EleutherAI/pythia-14m
  marlhf ppo pairs-small --data pairs.jsonl --model my/model --rm my/reward-model
  marlhf eval runs/ppo/tldr-tiny-macro5-c0-1a2b3c4d5e6f tldr-tiny
  marlhf run fig02_tldr --scale smoke --workers 2
  marlhf plan --scale tiny

from Python:
  import marlhf
  config = marlhf.load_config("tldr-tiny", "ppo.lam=0.99")
  run = marlhf.run("ppo", config)                # run.frame("evals"), run.path / "model"
"""
STAGES = {
    "sft": (
        "supervised fine-tuning",
        """\
        Stage 1: fine-tunes the model on the task's demonstrations (transformers.Trainer).

        reads   the SFT part of the data; the model (from scratch, a folder, or a hub name)
        writes  runs/sft/<preset>-c<seed>-<hash>/: model/, metrics.jsonl, manifest.json with the
                held-out loss before and after, and the true score where the task has one""",
        ("data", "model", "sft", "eval", "ppo.sampling"),
    ),
    "rm": (
        "reward model",
        """\
        Stage 2: trains a reward model on preference pairs, starting from the SFT model, and sets
        its score to mean 0, spread 1 on SFT samples.

        reads   the RM part of the data; the SFT run of the same settings, which is run first
                unless it is there or given with --sft
        writes  runs/rm/<preset>-c<seed>-<hash>/: model/, metrics.jsonl, manifest.json with the
                accuracy on held-out pairs and its 95% interval""",
        ("data", "model", "sft", "rm", "eval", "ppo.sampling"),
    ),
    "ppo": (
        "PPO over macro actions",
        """\
        Stage 3: trains the policy with PPO, credit being assigned between macro actions
        (ppo.macro.termination=token is plain PPO).

        reads   the PPO part of the data; the SFT and reward model runs of the same settings,
                which are run first unless they are there or given with --sft and --rm
        writes  runs/ppo/<preset>-<arm>-c<seed>-<hash>/: model/ and critic/, metrics.jsonl (a row
                an update), evals.jsonl (held-out scores), samples.jsonl (responses to read),
                manifest.json""",
        ("data", "model", "sft", "rm", "ppo", "eval"),
    ),
}


def _default(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return json.dumps(value).replace(" ", "") if isinstance(value, list) else str(value)


def _key_help(key: Key) -> str:
    choices = key.bounds.get("choices")
    text = key.help + (f" ({', '.join(choices)})" if choices else "")
    head = f"  {key.name}={_default(key.default)}"
    gap = "\n" if len(head) > 36 else ""
    body = textwrap.fill(text, 98, initial_indent=" " * 38, subsequent_indent=" " * 38)
    return head + (gap + body if gap else body[len(head) :])


def _keys_help(sections: Sequence[str]) -> str:
    """Every key under the sections with its default and help, a paragraph a section."""
    hints = typing.get_type_hints(Config)
    lines = ["keys (key=value; these are the defaults, a preset may differ: --show):"]
    for name in sections:
        found = [k for k in KEYS.values() if k.name.startswith(name + ".")]
        kind = hints.get(name)
        note = Config.__dataclass_fields__[name].metadata["help"] if kind else "sampling"
        lines += ["", f"{name}: {note}", *map(_key_help, found)]
    return "\n".join(lines)


def _add_settings(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("preset", help="configs/presets/<name>.yaml, or a path ending in .yaml")
    sub.add_argument("--data", metavar="SOURCE", help="file, folder or hub name (data.source)")
    sub.add_argument("--task", help="how its rows are read (data.task), such as tldr, pairs")
    sub.add_argument("--model", metavar="SOURCE", help="folder or hub name (model.name)")
    sub.add_argument("--seed", type=int, metavar="K", help="the chain: seeds every stage (seed)")
    sub.add_argument(
        "--threads", type=int, default=1, metavar="N", help="CPU threads; more change the last bits"
    )
    sub.add_argument("--show", action="store_true", help="print the settings and stop")


def _add_common(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--quiet", action="store_true", help="no progress bar")
    sub.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    available = textwrap.fill(f"presets: {', '.join(presets())}", 98, break_on_hyphens=False)
    main = argparse.ArgumentParser(
        "marlhf", description=OVERVIEW, epilog=EXAMPLES, formatter_class=raw
    )
    commands = main.add_subparsers(dest="command", metavar="command", required=True)
    for stage, (short, text, sections) in STAGES.items():
        sub = commands.add_parser(
            stage,
            help=short,
            description=textwrap.dedent(text),
            epilog=f"{available}\n\n{_keys_help(sections)}",
            usage=f"marlhf {stage} PRESET [key=value ...] [options]",
            formatter_class=raw,
            allow_abbrev=False,
        )
        _add_settings(sub)
        if stage != "sft":
            sub.add_argument("--sft", metavar="MODEL", help="a ready SFT model in stage 1's place")
        if stage == "ppo":
            sub.add_argument("--rm", metavar="MODEL", help="a ready reward model in stage 2's")
        _add_common(sub)
        sub.set_defaults(act=_stage)

    sub = commands.add_parser(
        "eval",
        help="scores of a model on held-out prompts",
        description="Samples a response to each held-out prompt and scores it with the chain's "
        "reward model (and the\ntrue scorer where the task has one). Prints the means; --out "
        "writes a row a prompt.",
        epilog=available,
        usage="marlhf eval RUN_OR_MODEL PRESET [key=value ...] [options]",
        formatter_class=raw,
        allow_abbrev=False,
    )
    sub.add_argument("source", metavar="RUN_OR_MODEL", help="a run's folder, a model, a hub name")
    _add_settings(sub)
    sub.add_argument("--sft", metavar="MODEL", help="the SFT model, for KL (default: the chain's)")
    sub.add_argument("--rm", metavar="MODEL", help="the reward model (default: the chain's)")
    sub.add_argument("--out", metavar="FILE", help="rows as JSON lines")
    _add_common(sub)
    sub.set_defaults(act=_eval)

    sub = commands.add_parser(
        "run",
        help="all runs of one experiment or of several, side by side",
        description="Runs every arm and chain of configs/experiments/<name>.yaml that is not "
        "finished yet, in\nprocesses side by side; runs that experiments share, once. Stop it with "
        "Ctrl-C; the same command\ngoes on.",
        epilog=_keys_help(("repeat",)),
        usage="marlhf run EXPERIMENT [EXPERIMENT ...] [key=value ...] [options]",
        formatter_class=raw,
        allow_abbrev=False,
    )
    sub.add_argument("experiment", nargs="+", help="configs/experiments/<name>.yaml")
    sub.add_argument("--scale", default="tiny", help="smoke, tiny (default) or full")
    sub.add_argument("--workers", type=int, help="processes (default: as many as GPUs or cores)")
    sub.add_argument(
        "--seeds", type=_seeds, metavar="K,K", help="chains, in place of 0, 1, ... (pilots)"
    )
    _add_common(sub)
    sub.set_defaults(act=_run)

    sub = commands.add_parser(
        "push",
        help="a run's model to the hub, with a card that holds its manifest",
        description="Uploads model/ of a finished run and a card. The repository is private unless "
        "--public.\nLog in first: hf auth login.",
        usage="marlhf push RUN REPOSITORY [--public]",
        formatter_class=raw,
        allow_abbrev=False,
    )
    sub.add_argument("source", metavar="RUN", help="a run's folder")
    sub.add_argument("repository", metavar="REPOSITORY", help="a hub name, as you/model")
    sub.add_argument("--public", action="store_true", help="for everyone to see")
    _add_common(sub)
    sub.set_defaults(act=_push)

    sub = commands.add_parser(
        "plan",
        help="the runs that a scale needs, and their minutes; or what a preset asks of a machine",
        description="The ledger: every run of every experiment at a scale, what is done already, "
        "minutes by\nconfigs/ledger.yaml (measured, for those that are done), and the total.\n\n"
        "With a preset (marlhf plan PRESET [key=value ...]): parameters, memory by part, batches "
        "and hours,\nwithout a download.",
        formatter_class=raw,
        allow_abbrev=False,
    )
    sub.add_argument(
        "experiment", nargs="*", help="these alone (default: all); or a preset and overrides"
    )
    sub.add_argument("--scale", default="tiny", help="smoke, tiny (default) or full")
    _add_common(sub)
    sub.set_defaults(act=_plan)

    sub = commands.add_parser(
        "claims",
        help="the paper's claims and what became of each, from the results of a scale",
        description="Reads configs/claims.yaml (the claims, the comparisons that decide them and "
        "the rule) and\nresults/<scale>/*/endpoints.csv; prints every verdict and writes "
        "results/<scale>/claims.csv\nand claims.json.",
        formatter_class=raw,
        allow_abbrev=False,
    )
    sub.add_argument("--scale", default="tiny", help="smoke, tiny (default) or full")
    sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    sub.set_defaults(act=_claims)
    return main


def _config(args: argparse.Namespace) -> Config:
    options = {"data.source": args.data, "data.task": args.task, "model.name": args.model}
    options["seed"] = args.seed
    given = {key: value for key, value in options.items() if value is not None}
    return load_config(args.preset, *args.overrides, given)


def _show(config: Config) -> None:
    from omegaconf import OmegaConf

    print(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))), end="")


def _print_run(run: Run) -> None:
    print(run.path)
    print(json.dumps(run.manifest["summary"], indent=1, ensure_ascii=False))
    if "samples" in run.tables:
        samples = run.frame("samples")
        if "update" in samples:
            samples = samples[samples["update"] == samples["update"].max()]
        names = {"rm_score": "RM score", "true_score": "true score"}
        shown = {n: text for n, text in names.items() if n in samples and samples[n].notna().all()}
        for row in samples.head(3).to_dict("records"):
            scores = [f"{text} {row[n]:.2f}" for n, text in shown.items()]
            print(f"\n[{row['prompt_id']}] {', '.join(scores)}")
            print(f"{row['prompt'].strip()}\n-> {row['response'].strip()}")


def _stage(args: argparse.Namespace) -> None:
    config = _config(args)
    if args.show:
        return _show(config)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is imported
    from marlhf.pool import execute
    from marlhf.stages import stage_spec

    ready = {key: getattr(args, key, None) for key in ("sft", "rm")}
    spec = stage_spec(args.command, config, **ready)
    run = execute([spec], 0, not args.quiet, args.threads)[0]
    return _print_run(run) if processes.main() else None


def _eval(args: argparse.Namespace) -> None:
    config = _config(args)
    if args.show:
        return _show(config)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    from marlhf.evaluate import summarise
    from marlhf.experiment import evaluate

    rows = evaluate(args.source, config, args.sft, args.rm)
    if args.out:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        Path(args.out).write_text("".join(lines), encoding="utf-8")
    return print(json.dumps(summarise(rows), indent=1))


def _run(args: argparse.Namespace) -> None:
    from marlhf.experiment import Experiment, execute

    overrides = [each for each in args.experiment if "=" in each] + args.overrides
    names = [each for each in args.experiment if "=" not in each]
    if not names:
        raise ConfigError("marlhf run needs an experiment: see marlhf run --help")
    found = [Experiment.load(name, args.scale, overrides, args.seeds) for name in names]
    specs = [spec for each in found for spec in each.specs()]
    execute(specs, args.workers, progress=not args.quiet)
    for each in found:
        for (arm, seed), spec in each.arm_specs().items():
            print(f"{arm} chain {seed}: {spec.folder}")


def _push(args: argparse.Namespace) -> None:
    from marlhf.hub import push_to_hub

    if args.overrides:
        raise ConfigError(f"unknown argument {args.overrides[0]}: see marlhf push --help")
    print(push_to_hub(args.source, args.repository, args.public))


def _plan(args: argparse.Namespace) -> None:
    from marlhf.experiment import experiments, plan

    first, *rest = args.experiment or [""]
    if first in presets() and first not in experiments():
        from marlhf.plans import preset_plan

        print(preset_plan(load_config(first, *rest)))
        return
    for name in args.experiment:
        if name not in experiments():
            known = [*experiments(), *presets()]
            raise ConfigError(f"no experiment and no preset {name!r}.{nearest(name, known)}")
    from marlhf.pool import workers_available

    table = plan(args.scale, args.experiment or None)
    total, left, workers = table["minutes"].sum(), table["left"].sum(), workers_available()
    unknown = table["minutes"].isna().any()
    print(table.round(1).to_string(index=False, na_rep="?"))
    print(
        f"\n{args.scale}: {table['runs'].sum()} runs, {table['done'].sum()} done; "
        f"{total:.0f} minutes of one process, {left:.0f} left, about {left / workers:.0f} with "
        f"{workers} side by side{' (? is not measured yet)' if unknown else ''}"
    )


def _claims(args: argparse.Namespace) -> None:
    from marlhf import report, verdicts

    folder = report.results_root() / args.scale
    if not folder.is_dir():
        raise ConfigError(f"no results in {folder}: make reproduce SCALE={args.scale}")
    found = verdicts.results(verdicts.load(), folder)
    verdicts.write(found, folder)
    print(verdicts.listing(found))
    print(f"\n{folder / 'claims.csv'} and claims.json written")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0, 1 (a run failed), 2 (bad input: one line says what), 130 (Ctrl-C)."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    args.overrides = rest
    try:
        for each in rest:
            if each.startswith("-") or args.command in ("plan", "claims"):
                raise ConfigError(f"unknown argument {each}: see marlhf {args.command} --help")
        args.act(args)
    except KeyboardInterrupt:
        print("marlhf: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        if getattr(error, "everywhere", False) and not processes.main():
            return 1  # every process raised it; the first one says it
        ours = type(error).__module__.startswith("marlhf.")
        if args.debug or not (ours or isinstance(error, ValueError)):
            raise
        notes = " ".join(getattr(error, "__notes__", []))
        who = "marlhf" if processes.main() else f"marlhf (process {processes.rank()})"
        print(f"{who}: {' '.join(str(error).split())} {notes}".rstrip(), file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
