"""A tiny model with a character tokenizer, data and a recipe, whose runs take seconds."""

import json
import re
import shutil
import string

import pytest
import yaml
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_trainer.__main__ import main
from opd_trainer.build import prepare
from opd_trainer.config import DistillationConfig, load_config
from tests.tiny_models import tiny_model

# Changes of the recipe below for a stage without a teacher.
NO_TEACHER = {"teacher": None, "privileged_context": None, "tail": None, "k": None}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHARACTERS = string.ascii_letters + string.digits + string.punctuation[:29] + " \n"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}/{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def tiny_tokenizer(chat=True, characters=CHARACTERS):
    """Return a tokenizer with one token per character; pad is EOS, as in SmolLM2."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="</s>",
        bos_token="<s>",
        pad_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = TEMPLATE if chat else None
    return tokenizer


def write_model(folder, seed=0, name="llama", tokenizer=None, **changes):
    """Save a tiny model with changes of its config, and its tokenizer."""
    model = tiny_model(name, seed=seed, **changes)
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def write_recipe(folder, **changes):
    """Write a recipe for a few steps of self-distillation of a tiny model, and its data."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        write_model(folder / "model")
        prompts = [{"prompt": f"say {i}"} for i in range(12)]
        (folder / "train.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
        (folder / "held_out.jsonl").write_text('{"prompt": "tell 1"}\n{"prompt": "tell 2"}\n')
        (folder / "scorer.py").write_text("def length(text, row):\n    return len(text)\n")
    recipe = {
        "model": str(folder / "model"),
        "teacher": "self",
        "privileged_context": "be brief",
        "train_data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "held_out.jsonl"),
        "scorer": f"{folder}/scorer.py:length",
        "output_dir": str(folder / "run"),
        "k": 8,
        "tail": "bucket",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "micro_batch_size": 2,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    } | changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v is not None}))
    return path


def make_trainer(folder, stage=DistillationConfig, **changes):
    """Return the trainer of a stage's recipe with changes, in an empty output directory."""
    config = load_config(stage, write_recipe(folder, **changes), [])
    shutil.rmtree(config.output_dir, ignore_errors=True)
    return prepare(config)[0]


def read_metrics(run):
    """Return the lines of training steps, and all lines, of metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], lines


def error_line(capsys, *arguments):
    """Run the command line, which must fail; return its error message."""
    with pytest.raises(SystemExit) as ended:
        main([str(x) for x in arguments])
    assert "Traceback" not in "".join(capsys.readouterr())
    assert re.fullmatch("error: .*", ended.value.code)  # `.` does not match a line break
    return ended.value.code
