"""Test every class of transformers' causal-LM mapping, and write docs/causal_lms.md.

    make causal-lms

Each class is built tiny and random from its own config. `lazy_logits(model, ids).materialize()` is
compared with `model(ids).logits`, and the loss of labels after `patch(model)` with the class's own
loss. A class works, or this package refuses it with an error; any difference makes the command exit
with status 1. A class that cannot be built from the keys of its config is listed with the reason.
"""

import argparse
import contextlib
import copy
import io
import logging
import re
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from opd_kernels.integrations.labels import patch
from opd_kernels.integrations.transformers import lazy_logits

SECONDS = 60  # time limit per class
MIN_WORKING = 130  # classes that must work
MAX_PARAMETERS = 30_000_000
VOCAB, TOKENS = 97, 9
# Sizes of a tiny config, each with the keys that configs use for it.
SIZES: dict[int, str] = {
    VOCAB: "vocab_size",
    32: "hidden_size n_embd d_model dim embedding_size emb_dim word_embed_proj_dim mamba_d_ssm "
        "attention_hidden_size lru_width rnn_hidden_size",
    64: "intermediate_size ffn_dim n_inner d_ff d_inner encoder_ffn_dim decoder_ffn_dim "
        "dense_intermediate_size mlp_hidden_size feed_forward_hidden_size shared_intermediate_size "
        "ffn_hidden_size block_ff_dim",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
       "num_key_value_heads n_kv_heads num_kv_heads num_experts_per_tok moe_topk moe_k "
       "num_query_groups",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
       "decoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts "
       "linear_num_value_heads linear_num_key_heads mamba_n_heads mamba_num_heads",
    8: "head_dim kv_channels attention_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim "
       "linear_key_head_dim linear_value_head_dim",
    16: "q_lora_rank kv_lora_rank moe_intermediate_size expert_intermediate_size state_size "
        "mamba_d_state ssm_state_size moe_shared_expert_intermediate_size "
        "shared_expert_intermediate_size mamba_d_head mamba_head_dim time_step_rank",
    256: "max_position_embeddings n_positions max_seq_len n_ctx max_sequence_length "
         "max_source_positions max_target_positions",
}  # fmt: skip
TINY = {name: size for size, names in SIZES.items() for name in names.split()}
ZERO = {"first_k_dense_replace"}
OVERRIDES: dict[str, dict[str, Any]] = {  # keys that SIZES does not get right, by model type
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "hidden_size": 32},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16],
                 "attn_layers": ["local", "local"], "num_attention_heads": 4},
    "whisper": {"decoder_attention_heads": 4, "encoder_attention_heads": 4},
    "plbart": {"decoder_attention_heads": 4, "encoder_attention_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
DROPOUT = re.compile("dropout|_pdrop|layerdrop")


def shrink(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the changes of a config, and of the configs inside it, that make the model tiny."""
    changes: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            changes[name] = shrink(inner) | {"model_type": inner.model_type}
        elif name in TINY and isinstance(value, int) and not isinstance(value, bool):
            changes[name] = TINY[name]
        elif name in ZERO:
            changes[name] = 0
        elif DROPOUT.search(name) and isinstance(value, float):
            changes[name] = 0.0
        elif name.endswith("_token_id") and isinstance(value, int):
            changes[name] = min(value, 2)
    return changes


def candidates(model_type: str) -> list[dict[str, Any]]:
    """Return changes to try in order: all of them, then without keys that may contradict others."""
    config = AutoConfig.for_model(model_type)
    if hasattr(config, "get_text_config") and config.get_text_config(decoder=True) is not config:
        config = config.get_text_config(decoder=True)
    changes = shrink(config)
    layers = {n: v[:2] for n, v in config.to_dict().items() if _is_per_layer(config, n, v)}
    options = [changes, changes | layers]
    options += [
        {k: v for k, v in x.items() if k not in ("head_dim", "kv_channels")} for x in options
    ]
    options.append(changes | layers | {"num_key_value_heads": 4})
    return [x | OVERRIDES.get(model_type, {}) for x in options]


def _is_per_layer(config: PreTrainedConfig, name: str, value: Any) -> bool:
    layers = getattr(config, "num_hidden_layers", None)
    return isinstance(value, list) and len(value) == layers and layers > 2


def build(model_type: str) -> torch.nn.Module:
    """Return the first candidate whose forward pass gives finite logits."""
    reasons = []
    for changes in candidates(model_type):
        try:
            text = AutoConfig.for_model(model_type)
            text = text.get_text_config(decoder=True)
            config = type(text)(**changes)
            config.is_decoder = True
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if size > MAX_PARAMETERS:
                raise ValueError(f"{size:,} parameters with the known keys")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).float().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
            logits = model(_ids(), use_cache=False).logits
            if logits.shape[:2] != (2, TOKENS) or not torch.isfinite(logits).all():
                raise ValueError(f"logits of shape {tuple(logits.shape)} or not finite")
            return model
        except TimeoutError:
            raise
        except Exception as error:
            reasons.append(error)
    raise reasons[0]


def _ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def walk(model_type: str) -> tuple[str, str, str]:
    """Return (works | refused | differs | not built, the reason, the result of patch)."""
    try:
        model = build(model_type)
    except TimeoutError:
        return "not built", f"more than {SECONDS} s", ""
    except Exception as error:
        return "not built", f"{type(error).__name__}: {error}", ""
    verdict, why = compare_logits(model)
    return verdict, why, compare_labels(model) if verdict == "works" else ""


def compare_labels(model: torch.nn.Module) -> str:
    """Return works | refused | differs, by the loss of labels; some of them are ignored (-100)."""
    labels = _ids()
    labels[0, :4] = -100
    with torch.no_grad():
        try:
            patched = patch(copy.deepcopy(model))
            expected = model(_ids(), labels=labels, use_cache=False).loss
            actual = patched(_ids(), labels=labels, use_cache=False).loss
        except ValueError as error:
            return "refused" if str(error).startswith("model: ") else f"differs: {error}"
        except Exception as error:
            return f"differs: {type(error).__name__}: {error}"
    difference = float((actual - expected).abs() / expected.abs())
    return "works" if difference < 1e-4 else f"differs by {difference:.1e}"


def compare_logits(model: torch.nn.Module) -> tuple[str, str]:
    """Return (works | refused | differs, the difference or the reason)."""
    with torch.no_grad():
        expected = model(_ids(), use_cache=False).logits
        try:
            actual = lazy_logits(model, _ids()).materialize()
        except Exception as error:
            ours = isinstance(error, ValueError) and str(error).startswith("model: ")
            return "refused" if ours else "differs", f"{type(error).__name__}: {error}"
    if actual.shape != expected.shape:
        return "differs", f"shape {tuple(actual.shape)} and {tuple(expected.shape)}"
    difference = float((actual - expected).abs().max() / expected.abs().max())
    works = difference < 1e-4
    return ("works", f"{difference:.0e}") if works else ("differs", f"by {difference:.1e}")


def _out_of_time(*_: Any) -> None:
    raise TimeoutError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "types", nargs="*", help="model types; by default all, which writes the page"
    )
    types = parser.parse_args().types
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    signal.signal(signal.SIGALRM, _out_of_time)
    results = {}
    for model_type in tqdm(types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        signal.alarm(SECONDS)
        with contextlib.redirect_stdout(io.StringIO()):
            results[model_type] = walk(model_type)
        signal.alarm(0)
    counts = Counter(verdict for verdict, *_ in results.values())
    labels = Counter(x.partition(" ")[0].strip(":") for *_, x in results.values() if x)
    page = table(results, counts, labels)
    print(page)
    if not types:
        Path("docs/causal_lms.md").write_text(page)
    wrong = counts["differs"] + labels["differs"]
    sys.exit(1 if wrong or (not types and counts["works"] < MIN_WORKING) else 0)


def table(
    results: dict[str, tuple[str, str, str]], counts: Counter[str], labels: Counter[str]
) -> str:
    """Return the page: the counts, and the verdict on each class."""

    def summary(counts: Counter[str]) -> str:
        return ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))

    lines = [
        "# Causal language models of transformers",
        "",
        f"Written by `make causal-lms` with transformers {transformers.__version__}. Each class of "
        "its causal-LM mapping is built tiny and random, and "
        "`lazy_logits(model, ids).materialize()` is compared with `model(ids).logits`. Results of "
        f"{len(results)} classes: {summary(counts)}. The difference is the largest one, relative "
        "to the largest logit. The last column compares the loss of labels after `patch(model)` "
        f"with the class's own: {summary(labels)}. `patch` refuses a class whose loss is not "
        "transformers' own shifted cross-entropy.",
        "",
        "| model type | result | difference or reason | labels |",
        "|---|---|---|---|",
    ]
    for name, (verdict, why, label) in results.items():
        why = " ".join(why.split())[:160].replace("|", "/")
        lines.append(f"| {name} | {verdict} | {why} | {label[:80]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
