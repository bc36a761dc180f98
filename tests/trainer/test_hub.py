"""push_to_hub: what is uploaded, and what happens without a network."""

import fnmatch
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi

from opd_trainer.__main__ import main
from tests.tiny_run import error_line, write_recipe

STUDENT = {
    "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
ADAPTERS = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "generation_config.json",
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch):
    """Record what a run creates and uploads; `hub.broken` makes uploads fail."""
    hub = SimpleNamespace(created=[], uploads=[], broken=False)

    def create_repo(_, repo_id, **options):
        hub.created.append((repo_id, options["private"]))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(_, *, repo_id, folder_path, path_in_repo, ignore_patterns, **options):
        if hub.broken:
            raise ConnectionError("no route\nto host")
        folder, ignored = Path(folder_path), ignore_patterns or []
        names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        names -= {name for name in names for x in ignored if fnmatch.fnmatch(name, x)}
        hub.uploads.append((repo_id, path_in_repo, names, options["commit_message"]))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return hub


def _run(folder, **changes):
    options = {"push_to_hub": True, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    recipe = write_recipe(folder, **options | changes)
    main(["distill", str(recipe)])
    return folder / "run"


def test_the_student_is_uploaded_with_a_card_and_nothing_else(tmp_path, hub):
    changes = {"hub_model_id": "me/student", "hub_private_repo": True, "steps_per_rollout": 2}
    run = _run(tmp_path, **changes, teacher_update_rate=0.5)
    assert set(hub.created) == {("me/student", True)}
    assert hub.uploads == [
        ("me/student", None, STUDENT, "Training in progress, step 1"),
        ("me/student", None, STUDENT, "Training in progress, step 2"),
        ("me/student", None, STUDENT | {"README.md"}, "End of training"),
    ]
    card = (run / "model" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "transformers"
    assert "# student" in card
    assert "This model is fine-tuned from a local model" in card
    assert "- learning_rate: 0.001" in card
    assert "| held-out | before | after |\n|---|---|---|\n| completion length |" in card
    assert "tell 1" not in card  # a prompt of the data
    assert json.loads((run / "config.json").read_text())["hub_model_id"] == "me/student"
    assert not (run / "README.md").exists()
    assert not (run / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("strategy", "places"),
    [
        ("end", [None]),
        ("checkpoint", [None, "last-checkpoint", None, "last-checkpoint", None]),
        ("all_checkpoints", [None, "checkpoint-1", None, "checkpoint-2", None]),
    ],
)
def test_strategies(tmp_path, hub, strategy, places):
    _run(tmp_path, hub_strategy=strategy)
    assert [place for _, place, _, _ in hub.uploads] == places
    assert {repository for repository, *_ in hub.uploads} == {"me/run"}  # after output_dir
    whole = [names for _, place, names, _ in hub.uploads if place]
    assert all({"optimizer.pt", "manifest.json"} < names for names in whole)


def test_adapters_are_uploaded_as_such(tmp_path, hub):
    run = _run(tmp_path, lora_r=2, hub_strategy="end")
    ((_, _, names, _),) = hub.uploads
    assert names == ADAPTERS | {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    card = (run / "model" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"


def test_an_upload_that_fails_loses_nothing(tmp_path, hub, capsys):
    hub.broken = True
    with (
        pytest.warns(UserWarning, match="push_to_hub: checkpoint-1 could not be uploaded, and the"),
        pytest.raises(SystemExit) as ended,
    ):
        _run(tmp_path, hub_model_id="me/student")
    model = tmp_path / "run" / "model"
    assert ended.value.code == (
        f"error: push_to_hub: the student is in {model} but could not be uploaded; run `hf upload "
        f"me/student {model}`; ConnectionError: no route to host"
    )
    assert (model / "model.safetensors").exists()


def test_no_access_is_said_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise PermissionError("401 Client Error")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    recipe = write_recipe(tmp_path, push_to_hub=True, hub_model_id="me/student")
    assert error_line(capsys, "distill", recipe) == (
        "error: push_to_hub: expected access to me/student on the hub, by `hf auth login` or "
        "HF_TOKEN; PermissionError: 401 Client Error"
    )
    assert not (tmp_path / "run").exists()
