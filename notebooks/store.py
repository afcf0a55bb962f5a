"""Execute lessons and store them as they are committed: with outputs, for nbval to compare.

    python notebooks/store.py lesson1_credit lesson3_macro_gae

Outputs are stored without what a reader without a kernel cannot use or what changes from run to
run: sliders (the static picture beside them stays), execution times, kernel details.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
SLIDERS = "application/vnd.jupyter.widget-view+json"


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with nothing in it but cells, tags, outputs and the kernel's name; in place."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": kernel, "language_info": {"name": "python"}}
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if SLIDERS not in o.get("data", {})]
    return notebook


def store(path: Path) -> None:
    """Execute and overwrite; raises CellExecutionError and leaves the file if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=folder).execute()
    nbformat.write(clean(notebook), path)


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    for name in sys.argv[1:]:
        store(HERE / f"{name.removesuffix('.ipynb')}.ipynb")
        print(f"{name}: executed and stored")
