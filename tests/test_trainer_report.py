"""What a run leaves to look at."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tests.tiny_run import write_recipe
from trainer.__main__ import prepare, train
from trainer.config import load_config


def test_digits_and_markup_survive_in_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(
        PreTrainedTokenizerBase, "batch_decode", lambda _, ids, **__: ["007"] * len(ids)
    )
    config = load_config(write_recipe(tmp_path, max_steps=1), [])
    train(*prepare(config))
    assert "- after: 007" in (Path(config.output_dir) / "report.md").read_text()
