"""Chat templates in the manner of well-known models, and a tokenizer with their tokens."""

from tests.tiny_run import tiny_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Gemma: no system role, contents are stripped, an answer comes from the role model.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Llama 3: a date in a system message that is always there.
LLAMA = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "today: {{ strftime_now('%d %b %Y') }}<|eot_id|>{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Qwen3: a block of thoughts in the last answer, empty without thoughts; tools and their calls.
QWEN = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}"
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# DeepSeek-R1: the prompt opens a block of thoughts, which a finished answer does not have.
R1 = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# SmolVLM: contents are lists of parts.
PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{{ p.text }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
# A template without a token that ends turns.
PLAIN = (
    "{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "gemma": GEMMA,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen": QWEN,
    "r1": R1,
    "parts": PARTS,
    "plain": PLAIN,
}
_TOKENS = [
    "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]", "<think>", "</think>", "<tool_call>",
    "<|user|>", "<|assistant|>", "<end_of_utterance>", "}",
]  # fmt: skip
VOCABULARY = 97 + len(_TOKENS)  # tokens of the tokenizer


def chat_tokenizer(style):
    """Return the character tokenizer with the tokens and one of the templates; EOS stays </s>."""
    tokenizer = tiny_tokenizer()
    # Not special tokens: a decoder that skips these would keep the ends of turns.
    tokenizer.add_tokens(_TOKENS)
    tokenizer.chat_template = TEMPLATES[style]
    return tokenizer


def text_of(tokenizer, ids):
    """Return the text of token ids, character by character."""
    return "".join(tokenizer.convert_ids_to_tokens(ids))
