"""What would be uploaded: weights as safetensors, a card with the manifest, no folder's name."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest

from marlhf.cli import main
from marlhf.hub import model_card
from marlhf.runs import Run

CONFIG = {"model": {"name": "google/gemma-2b"}, "data": {"source": "/folder/of/rows"}}


@pytest.fixture
def run(tmp_path):
    identity = {"stage": "ppo", "config": CONFIG, "seed": 3}
    with Run.open("ppo", "tldr", identity, tmp_path) as run:

        def write(folder):
            for name in ("config.json", "model.safetensors", "weights.bin"):
                (folder / name).write_text("{}")

        run.save_model(write)
        run.finish({"after": {"rm_score": 1.5}})
    return run


def test_the_card_holds_the_manifest_and_no_folder(run):
    card = model_card(run)
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "base_model: google/gemma-2b" in card and "AutoModelForCausalLM" in card
    manifest = json.loads(card.rpartition("```json\n")[2].rpartition("\n```")[0])
    assert manifest["hash"] == run.hash and manifest["summary"] == {"after": {"rm_score": 1.5}}
    assert manifest["config"]["data"]["source"] == "rows" and "/folder" not in card


def test_push_uploads_card_and_model(run, monkeypatch, capsys):
    calls = []

    class Api:
        def create_repo(self, name, private, exist_ok):
            calls.append((name, private))

        def upload_folder(self, repo_id, folder_path, **options):
            from pathlib import Path

            files = {path.name: path.read_text() for path in Path(folder_path).iterdir()}
            calls.append((repo_id, files, options))
            return "https://the.hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert main(["push", str(run.path), "me/model"]) == 0
    assert capsys.readouterr().out == "https://the.hub/commit\n"
    (name, private), (_, card, _), (_, files, options) = calls
    assert name == "me/model" and private
    assert 'from_pretrained("me/model")' in card["README.md"]
    assert "model.safetensors" in files and "*.bin" not in options["allow_patterns"]


def test_errors_are_one_line(run, tmp_path, monkeypatch, capsys):
    assert main(["push", str(tmp_path), "me/model"]) == 2
    assert "is no finished run" in capsys.readouterr().err

    def refused(*_, **__):
        raise OSError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(create_repo=refused))
    assert main(["push", str(run.path), "me/model"]) == 2
    assert "hf auth login" in capsys.readouterr().err
