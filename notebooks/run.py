"""Execute notebooks by name, as `make reproduce` and `make figure` do.

    python notebooks/run.py fig02_tldr --scale tiny -p workers 2

Thin on purpose: papermill does the work. What it adds: a name that is not a parameter of the
notebook is an error (papermill only warns and runs with the defaults), progress bars reach the
terminal, and a failed cell ends in one line that says where the executed copy is. That copy goes to
<runs>/notebooks/<scale>/<name>.ipynb; results are what the notebook writes.
"""

import argparse
import difflib
import logging
import os
import sys
import time
from pathlib import Path

import papermill
import yaml

HERE = Path(__file__).resolve().parent


def find(name: str) -> Path:
    """The notebook of that name; raises ValueError with the nearest names."""
    path = HERE / f"{name.removesuffix('.ipynb')}.ipynb"
    if not path.exists():
        names = sorted(p.stem for p in HERE.glob("*.ipynb"))
        near = difflib.get_close_matches(name, names, n=3) or names
        raise ValueError(f"no notebook {name!r} in {HERE.name}/; there is {', '.join(near)}")
    return path


def check_parameters(path: Path, given: dict) -> None:
    """Raises ValueError if a given name is not in the notebook's parameters cell."""
    known = papermill.inspect_notebook(str(path))
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or sorted(known)
            raise ValueError(f"{path.stem} has no parameter {name!r}; there is {', '.join(near)}")


def execute(path: Path, scale: str, given: dict) -> Path:
    """Runs the notebook in its own folder's kernel and returns the executed copy's path."""
    runs = Path(os.environ.get("MARLHF_RUNS", HERE.parent / "runs"))
    output = runs / "notebooks" / scale / path.name
    output.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        str(path),
        str(output),
        parameters={"scale": scale, **given},
        kernel_name="python3",
        cwd=str(HERE.parent),
        progress_bar=False,
        stdout_file=sys.stdout,
        stderr_file=sys.stderr,
        extra_arguments=["--IPKernelApp.log_level=50"],  # no notes about its sockets and its end
    )
    return output


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help="notebooks, in this order")
    parser.add_argument("--scale", default="tiny", help="smoke, tiny or full")
    parser.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter of the notebook; YAML value",
    )
    options = parser.parse_args(arguments)
    logging.getLogger("papermill").setLevel(logging.ERROR)
    given = {name: yaml.safe_load(value) for name, value in options.parameter}
    try:
        paths = [find(name) for name in options.names]
        for path in paths:  # all of them before any work is begun
            check_parameters(path, {"scale": options.scale, **given})
    except ValueError as error:
        parser.error(str(error))
    for path in paths:
        start = time.monotonic()
        print(f"{path.stem} at {options.scale}", flush=True)
        try:
            output = execute(path, options.scale, given)
        except papermill.PapermillExecutionError as error:
            print(f"{path.stem}: {error.ename}: {error.evalue}", file=sys.stderr)
            print(
                f"  run it again to go on from where it stopped; the cell stands in "
                f"runs/notebooks/{options.scale}/{path.name}",
                file=sys.stderr,
            )
            return 1
        print(f"{path.stem}: {(time.monotonic() - start) / 60:.1f} min, executed copy {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
