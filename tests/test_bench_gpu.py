"""The GPU benchmark runs from end to end at toy sizes; what it says there measures nothing."""

import json
import sys

import pytest

from benchmarks import bench_gpu
from marlhf import compiled


def test_toy_sizes_from_end_to_end(monkeypatch, tmp_path, capsys):
    out = tmp_path / "folder" / "toy.json"
    monkeypatch.setattr(compiled, "COMPILER", {"backend": "eager"})  # no C++ compiler is needed
    compiled._compiled.cache_clear()
    monkeypatch.setattr(sys, "argv", ["bench_gpu", "--toy", "--out", str(out)])
    bench_gpu.main()
    found = json.loads(out.read_text())
    assert found["toy"] and found == json.loads(capsys.readouterr().out)
    for kind in ("lora", "all weights"):
        parts = found[kind]["seconds"]
        assert set(parts) == {"sampling", "scoring", "advantages", "learning", "update"}
        assert parts["update"] == pytest.approx(sum(parts.values()) - parts["update"])
        assert found[kind]["sampled_tokens_per_second"] > 0
    compiled._compiled.cache_clear()
    assert found["lora, compiled step"]["sampled_tokens_per_second"] > 0
    assert found["limits"]["copy_gb_per_second"] > 0 and found["macro_gae"]["copies"] > 0
