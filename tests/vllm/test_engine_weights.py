"""vLLM's engine in this process samples from the weights that Transformers trains."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

TOLERANCE = 1e-3  # float32 in both, with different kernels
NEW_TOKENS = 8
LENGTHS = (5, 40, 300)  # the last one spans several blocks of the prefix cache, of 128 tokens each


@pytest.fixture(scope="module")
def engine(smollm2):
    from vllm import LLM

    set_num_threads = torch.set_num_threads
    with torch.random.fork_rng():
        engine = LLM(
            model=str(smollm2),
            dtype="float32",
            enforce_eager=True,
            max_model_len=512,
            logprobs_mode="processed_logprobs",
        )
    torch.set_num_threads = set_num_threads  # vLLM replaces it by a no-op
    return engine


@pytest.fixture
def student(model, engine):
    """Return a model to change; the engine has its weights."""
    load_weights(engine, model.state_dict().items())
    return copy.deepcopy(model)


@pytest.fixture
def prompts():
    return [torch.randint(3, 49152, (length,)).tolist() for length in LENGTHS]


def load_weights(engine, weights, reset=True):
    """Load weights by Transformers' names; the engine copies and repacks them in place."""
    with torch.no_grad():
        engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    if reset:
        assert engine.reset_prefix_cache()


def merged_weights(model):
    """Return the merged weights of a model with LoRA adapters, by the names of its base."""
    base = model.base_model.model
    adapted = {n: m for n, m in base.named_modules() if isinstance(m, LoraLayer)}
    for name, tensor in base.state_dict().items():
        layer = adapted.get(name.removesuffix(".base_layer.weight"))
        if layer is not None:
            deltas = [layer.get_delta_weight(adapter) for adapter in layer.active_adapters]
            tensor = tensor + sum(deltas)
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), tensor


def disturb(parameters, size):
    """Add noise relative to each parameter's deviation, enough to change greedy completions."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(size * parameter.std().nan_to_num() * torch.randn_like(parameter))


def sample(engine, prompts, seed=0, **options):
    """Return each prompt's completions as (ids, log-probabilities of the ids)."""
    from vllm import SamplingParams

    options = {"temperature": 0.0, "max_tokens": NEW_TOKENS} | options
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    params = [
        SamplingParams(seed=seed + i, logprobs=0, detokenize=False, **options)
        for i in range(len(inputs))
    ]
    with torch.random.fork_rng():
        outputs = engine.generate(inputs, params, use_tqdm=False)
    return [[unpack(one) for one in output.outputs] for output in outputs]


def unpack(completion):
    ids = list(completion.token_ids)
    log_probs = [at[i].logprob for at, i in zip(completion.logprobs, ids, strict=True)]
    return ids, torch.tensor(log_probs)


def greedy(engine, prompts):
    return [ids for [(ids, _)] in sample(engine, prompts)]


@torch.no_grad()
def expected_greedy(model, prompts):
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 2}
        row = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        expected.append(row[0, len(prompt) :].tolist())
    return expected


@torch.no_grad()
def expected_log_probs(model, prompt, completion, temperature):
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    log_probs = (logits.float() / temperature).log_softmax(-1)
    return log_probs.gather(-1, torch.tensor(completion)[:, None])[:, 0]


def test_samples_log_probs_are_at_the_temperature(engine, student, prompts):
    for prompt, completions in zip(
        prompts, sample(engine, prompts, temperature=0.7, n=3), strict=True
    ):
        assert len({tuple(ids) for ids, _ in completions}) == 3
        for ids, log_probs in completions:
            expected = expected_log_probs(student, prompt, ids, 0.7)
            torch.testing.assert_close(log_probs, expected, atol=TOLERANCE, rtol=0)


def test_a_seed_fixes_a_sample_whatever_is_beside_it(engine, student, prompts):
    together = sample(engine, prompts, seed=7, temperature=1.0)
    alone = [sample(engine, [p], seed=7 + i, temperature=1.0)[0] for i, p in enumerate(prompts)]
    assert [ids for [(ids, _)] in together] == [ids for [(ids, _)] in alone]
    other = sample(engine, prompts, seed=70, temperature=1.0)
    assert [ids for [(ids, _)] in together] != [ids for [(ids, _)] in other]


def test_a_completion_ends_with_its_stop_token(engine, student, prompts):
    whole = greedy(engine, prompts[:1])[0]
    assert whole == expected_greedy(student, prompts[:1])[0]
    [[(stopped, _)]] = sample(engine, prompts[:1], stop_token_ids=[whole[3]])
    assert stopped == whole[: whole.index(whole[3]) + 1]


def test_greedy_follows_each_change_of_the_weights(engine, student, prompts):
    for _ in range(2):
        before = greedy(engine, prompts)
        disturb(student.parameters(), 0.05)
        expected = expected_greedy(student, prompts)
        assert before != expected
        load_weights(engine, student.state_dict().items())
        assert greedy(engine, prompts) == expected
    disturb(student.parameters(), 0.05)
    assert greedy(engine, prompts) == expected  # the engine does not share memory with the student


def test_the_prefix_cache_holds_what_the_old_weights_computed(engine, student, prompts):
    greedy(engine, prompts)
    disturb(student.parameters(), 0.05)

    def distance():
        [[(ids, log_probs)]] = sample(engine, prompts[-1:])
        return (log_probs - expected_log_probs(student, prompts[-1], ids, 1.0)).abs().max()

    load_weights(engine, student.state_dict().items(), reset=False)
    assert distance() > 10 * TOLERANCE
    assert engine.reset_prefix_cache()
    assert distance() < TOLERANCE


def test_adapters_are_merged_on_the_way(engine, student, prompts):
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    adapted = get_peft_model(student, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    expected = expected_greedy(adapted, prompts)
    assert greedy(engine, prompts) != expected

    weights = dict(merged_weights(adapted))
    assert weights.keys() == before.keys()
    load_weights(engine, weights.items())
    assert greedy(engine, prompts) == expected

    after = adapted.unload().state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=0, rtol=0)
