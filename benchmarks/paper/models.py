"""Tiny models with random weights, and their tokenizers."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.paper.tasks import LETTERS

# "<" precedes a system message, ">" a user message, and "=" the answer.
CHAT = (
    "{% for m in messages %}"
    "{{ {'system': '<', 'user': '>', 'assistant': '='}[m['role']] }}{{ m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


def tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per letter; for chats, also per digit and mark."""
    characters = LETTERS + "0123456789<>=" * chat
    vocab = {token: i for i, token in enumerate(["</s>", "<unk>", *characters])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    core.decoder = decoders.Fuse()
    special = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    result = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    result.chat_template = CHAT if chat else None
    return result


def write_random_model(
    folder: Path, seed: int, *, chat: bool = False, hidden_size: int = 144, layers: int = 1
) -> str:
    """Write a Llama with random weights and its tokenizer, unless the folder has one.

    The default sizes make 0.2 million parameters.

    Returns:
        The folder, for a recipe's `model`.
    """
    if not (folder / "config.json").exists():
        torch.manual_seed(seed)
        text = tokenizer(chat)
        config = LlamaConfig(
            vocab_size=len(text), hidden_size=hidden_size, intermediate_size=2 * hidden_size,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=64, eos_token_id=0, pad_token_id=0, bos_token_id=None,
        )  # fmt: skip
        text.save_pretrained(folder)
        LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)
