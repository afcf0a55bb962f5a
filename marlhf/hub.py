"""A finished run's model on the hub, with a card that holds the run's manifest."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from marlhf.runs import Run

TITLES = {"sft": "supervised fine-tuning", "rm": "reward model", "ppo": "PPO over macro actions"}
LOADERS = {"rm": "AutoModelForSequenceClassification"}


def model_card(run: Run) -> str:
    """The text of README.md: how to load the model, what came out, the whole manifest. Folders of
    this machine are named by their last part alone."""
    manifest, name = _without_folders(run.manifest), run.manifest["config"]["model"]["name"]
    base = None if name == "tiny" or Path(name).is_dir() else name
    head = ["---", "library_name: transformers", "tags: [marlhf, rlhf, macro-actions]"]
    head += [f"base_model: {base}"] if base else []
    loader = LOADERS.get(manifest["stage"], "AutoModelForCausalLM")
    what = TITLES.get(manifest["stage"], manifest["stage"])
    summary = json.dumps(manifest["summary"], indent=1, ensure_ascii=False)
    return "\n".join(
        [
            *head,
            "---",
            f"# {manifest['name']}",
            "",
            f"Made by marlhf ({what}; MA-RLHF, arXiv 2410.02743), run `{manifest['hash']}`, "
            f"seed {manifest['seed']}.",
            "",
            "```python",
            f"from transformers import {loader}, AutoTokenizer",
            f'model = {loader}.from_pretrained("REPOSITORY")',
            'tokenizer = AutoTokenizer.from_pretrained("REPOSITORY")',
            "```",
            "",
            "What came out:",
            "",
            f"```json\n{summary}\n```",
            "",
            "The run's manifest: settings, data, versions, source.",
            "",
            f"```json\n{json.dumps(manifest, indent=1, ensure_ascii=False)}\n```",
            "",
        ]
    )


def push_to_hub(run: str | Path, repository: str, public: bool = False) -> str:
    """Uploads the model of a finished run and its card -> the commit's address.

    The repository is private unless `public`. Raises ValueError for a run that is not finished or
    has no model, and where the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    run = Run(run)
    card = model_card(run).replace("REPOSITORY", repository)
    if not (run.path / "model" / "config.json").is_file():
        raise ValueError(f"{run.path} has no model to upload")
    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "README.md").write_text(card, encoding="utf-8")
            api.upload_folder(repo_id=repository, folder_path=folder)
        info = api.upload_folder(
            repo_id=repository,
            folder_path=run.path / "model",
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
            ignore_patterns=["adapter/*"],  # its settings name a folder of this machine
        )
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the hub refused {repository!r} ({reason}): `hf auth login`") from error
    return str(info)


def _without_folders(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_folders(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_folders(value) for value in tree]
    if isinstance(tree, str) and Path(tree).is_absolute():
        return Path(tree).name
    return tree
