"""For every pytest session, `pytest --nbval-lax notebooks` by hand included: smoke sizes, one
thread a process, and runs and results in a temporary folder, so that nothing committed changes."""

import os
import shutil
import tempfile
from pathlib import Path


def pytest_configure(config):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
    os.environ["SCALE"] = "smoke"
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # the controller's folder, so that workers share finished runs
    config.marlhf_folder = Path(tempfile.mkdtemp(prefix="marlhf-test-"))
    os.environ["MARLHF_RUNS"] = str(config.marlhf_folder / "runs")
    os.environ["MARLHF_RESULTS"] = str(config.marlhf_folder / "results")


def pytest_unconfigure(config):
    if hasattr(config, "marlhf_folder"):
        shutil.rmtree(config.marlhf_folder, ignore_errors=True)
