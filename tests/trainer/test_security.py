"""Untrusted models, checkpoints and servers cannot run code or exhaust resources."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from opd_trainer.__main__ import main
from opd_trainer.config import DistillationConfig, load_config
from opd_trainer.errors import TeacherError
from opd_trainer.models.load import load_model
from opd_trainer.models.server import ServedTeacher
from opd_trainer.run.directory import publish
from tests.fake_server import KEY, FakeServer
from tests.tiny_run import tiny_tokenizer, write_model, write_recipe
from tests.trainer_steps import completions


class Bomb:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.write_text, (Path(self.path), "it ran")


def test_the_bomb_would_go_off(tmp_path):
    torch.save(Bomb(tmp_path / "mark"), tmp_path / "bomb.pt")
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_cannot_run_code(tmp_path, name):
    """Even if its manifest is correct."""
    recipe = write_recipe(tmp_path, max_steps=3, save_strategy="steps", save_steps=2)
    main(["distill", str(recipe), "--max_steps", "2"])
    checkpoint, staged = tmp_path / "run" / "checkpoint-2", tmp_path / "new" / "checkpoint-2"
    shutil.copytree(checkpoint, staged)
    torch.save(Bomb(tmp_path / "mark"), staged / name)
    (staged / "manifest.json").unlink()
    shutil.rmtree(checkpoint)
    publish(staged, checkpoint)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        main(["distill", str(recipe), "--resume_from_checkpoint", "auto"])
    assert not (tmp_path / "mark").exists()


def test_weights_that_are_a_pickle_cannot_run_code(tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb(tmp_path / "mark")}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        load_model(str(folder), "float32")
    assert not (tmp_path / "mark").exists()


def test_nothing_that_is_saved_is_a_pickle_of_objects(tmp_path):
    recipe = write_recipe(tmp_path, max_steps=2, save_strategy="steps", save_steps=2,
                          teacher_update_rate=0.5, steps_per_rollout=2)  # fmt: skip
    main(["distill", str(recipe)])
    names = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "training_args.bin" not in names
    assert {Path(name).suffix for name in names} == {
        "", ".json", ".jsonl", ".jinja", ".md", ".png", ".pt", ".pth", ".safetensors",
    }  # fmt: skip
    checkpoint = tmp_path / "run" / "checkpoint-2"
    for path in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
        with torch.serialization.safe_globals(_of_numpy()):
            torch.load(path, weights_only=True)


def _of_numpy():
    """Return the NumPy types that transformers allows in a random state."""
    import numpy as np

    reconstruct = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    return [reconstruct, np.ndarray, np.dtype, np.dtypes.UInt32DType]


def _bring_code(folder, mark):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}
    config["model_type"] = "own"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(mark)!r}).write_text('it ran')\n"
        "class Own(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = Own\n"
    )


def test_code_of_a_model_runs_only_where_the_recipe_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    recipe = write_recipe(tmp_path, max_steps=1)
    _bring_code(tmp_path / "model", tmp_path / "mark")
    with pytest.raises(SystemExit, match="trust_remote_code"):
        main(["distill", str(recipe)])
    assert not (tmp_path / "mark").exists()
    main(["distill", str(recipe), "--trust_remote_code", "true"])
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("flood", "the answer is larger than a valid one can be"),
        ("gzip", "expected an answer without compression"),
        ("drip", r"the answer takes longer than 2\.0 s"),
    ],
)
def test_a_server_cannot_fill_the_memory_or_hold_a_run_for_ever(
    tmp_path, monkeypatch, fault, message
):
    monkeypatch.setenv("OPD_TEACHER_API_KEY", KEY)
    server = FakeServer(load_model(str(write_model(tmp_path / "teacher", seed=1)), "float32"))
    options = {"teacher": server.url, "tail": None, "support": "teacher"}
    options |= {"teacher_timeout": 2.0, "teacher_patience": 0.5}
    config = load_config(DistillationConfig, write_recipe(tmp_path, **options), [])
    teacher = ServedTeacher(server.url, config, tiny_tokenizer(), 97)
    server.faults = [fault] * 1000
    start = time.monotonic()
    teacher.prepare(completions())
    with pytest.raises(TeacherError, match=f"no good answer from .*{message}"):
        teacher.logits(completions(), 1.0)
    assert time.monotonic() - start < 20
    assert server.sent < 100 << 20
    server.stop()


def test_tokens_of_hubs_are_refused_in_recipes_and_written_nowhere(tmp_path, monkeypatch, capfd):
    secret = "hf_verysecret0123456789"
    monkeypatch.setenv("HF_TOKEN", secret)
    recipe = write_recipe(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(SystemExit, match=r"hub_token: expected none, .*; set HF_TOKEN") as error:
        main(["distill", str(recipe), "--hub_token", secret])
    assert secret not in str(error.value)
    main(["distill", str(recipe)])
    output = capfd.readouterr()
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert secret.encode() not in written
    assert secret not in output.out + output.err
