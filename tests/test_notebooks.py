"""Notebooks as a product: their shape, and the thin wrapper that executes them. `make test` also
runs every one of them at smoke under nbval."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

HOME = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((HOME / "notebooks").glob("*.ipynb"))
READ = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
RESULTS = [p for p in NOTEBOOKS if "report.finish(" in p.read_text(encoding="utf-8")]
MAKES_RESULTS = pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)

spec = importlib.util.spec_from_file_location("run", HOME / "notebooks" / "run.py")
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)


def code_cells(path):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


@READ
def test_one_parameters_cell_of_literals(path):
    tagged = [c for c in code_cells(path) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    for node in ast.parse(tagged[0].source).body:
        assert isinstance(node, ast.Assign)
        ast.literal_eval(node.value)


@MAKES_RESULTS
def test_sizes_come_from_the_environment_and_the_summary_last(path):
    values = run.papermill.inspect_notebook(str(path))
    assert {"scale", "workers", "results"} <= set(values)
    assert values["scale"]["default"] == "None"
    assert "report.finish(" in code_cells(path)[-1].source


@READ
def test_cells_are_short(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.metadata.kernelspec.name == "python3"
    assert max(len(c.source.splitlines()) for c in code_cells(path)) <= 40


@READ
def test_outputs_are_cleared_or_whole(path):
    """Committed without outputs; or, to be compared by nbval, executed top to bottom in one go."""
    cells = code_cells(path)
    counts = [cell.execution_count for cell in cells]
    assert counts in ([None] * len(cells), list(range(1, len(cells) + 1)))
    for cell in cells:
        assert counts[0] or cell.outputs == []
        assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in cell.outputs)
        assert not {"execution", "papermill"} & set(cell.metadata)


def test_an_unknown_parameter_is_an_error():
    path = run.find("fig02_tldr")
    assert run.check_parameters(path, {"scale": "smoke", "workers": 1}) is None
    with pytest.raises(ValueError, match="no parameter 'worker'.*workers"):
        run.check_parameters(path, {"worker": 1})


def test_an_unknown_notebook_is_an_error_with_the_nearest_name():
    with pytest.raises(ValueError, match="fig02_tldr"):
        run.find("fig02")
    command = [sys.executable, str(HOME / "notebooks" / "run.py"), "quickstart", "-p", "n", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "quickstart has no parameter 'n'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failed_cell_ends_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MARLHF_RUNS", str(tmp_path))
    cells = [
        nbformat.v4.new_code_cell("scale = None", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("raise ValueError(f'not at {scale}')"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = tmp_path / "broken.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    monkeypatch.setattr(run, "HERE", tmp_path)
    assert run.main(["broken", "--scale", "smoke"]) == 1
    assert "broken: ValueError: not at smoke" in capsys.readouterr().err
    assert (tmp_path / "notebooks" / "smoke" / "broken.ipynb").exists()


def test_tests_leave_committed_results_alone():
    assert os.environ["SCALE"] == "smoke"
    for name in ("MARLHF_RUNS", "MARLHF_RESULTS"):
        assert not Path(os.environ[name]).is_relative_to(HOME)
