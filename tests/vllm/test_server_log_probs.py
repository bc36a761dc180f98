"""A vLLM server returns the model's log-probabilities, and refuses wrong requests clearly."""

import asyncio

import openai
import pytest
import torch

from opd_kernels import SparseLogits
from tests.vllm.server import API_KEY

K = 20
TOLERANCE = 1e-3  # float32 in both, with different kernels


@pytest.fixture
def client(server_url):
    return openai.OpenAI(base_url=server_url, api_key=API_KEY, max_retries=0)


def random_prompts(lengths):
    return [torch.randint(3, 49152, (length,)).tolist() for length in lengths]


def scoring_request(prompt, k=K, **options):
    """Return a request for prompt log-probs; max_tokens is 1, as the server refuses 0."""
    body = {"prompt_logprobs": k}
    return {"model": "smollm2", "prompt": prompt, "max_tokens": 1, "extra_body": body} | options


def scores(choice):
    """Return dictionaries [tokens - 1] of log-probability and rank by id, from the second token."""
    first, *rest = choice.prompt_logprobs
    assert first is None
    return [{int(i): (one["logprob"], one["rank"]) for i, one in d.items()} for d in rest]


@torch.no_grad()
def reference(model, prompt):
    """Return log-probabilities [tokens - 1, V] from the second token."""
    return model(torch.tensor([prompt])).logits[0, :-1].float().log_softmax(-1)


def best(position, k=K):
    """Return the k best ids in order; the actual token may be an extra entry."""
    in_order = sorted(position, key=lambda i: position[i][1])
    return in_order[:k]


def check(choice, prompt, model):
    expected = reference(model, prompt)
    returned = scores(choice)
    assert len(returned) == len(prompt) - 1
    for row, position, actual in zip(expected, returned, prompt[1:], strict=True):
        assert set(position) == {*best(position), actual}
        assert [position[i][1] for i in best(position)] == list(range(1, K + 1))
        log_probs = torch.tensor([log_prob for log_prob, _ in position.values()])
        torch.testing.assert_close(log_probs, row[list(position)], atol=TOLERANCE, rtol=0)
        top = torch.tensor([position[i][0] for i in best(position)])
        torch.testing.assert_close(top, row.topk(K).values, atol=TOLERANCE, rtol=0)


def test_concurrent_requests_get_the_models_log_probs(server_url, model):
    prompts = random_prompts([2, 3, 17, 128, 129, 300, *range(20, 120, 10)])

    async def ask():
        async with openai.AsyncOpenAI(base_url=server_url, api_key=API_KEY) as client:
            requests = [client.completions.create(**scoring_request(p)) for p in prompts]
            return await asyncio.gather(*requests)

    for completion, prompt in zip(asyncio.run(ask()), prompts, strict=True):
        check(completion.choices[0], prompt, model)


def test_a_request_may_hold_several_prompts(client, model):
    prompts = random_prompts([5, 40, 2])
    choices = client.completions.create(**scoring_request(prompts)).choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    for choice, prompt in zip(choices, prompts, strict=True):
        check(choice, prompt, model)


def test_neither_temperature_nor_the_prefix_cache_changes_them(client, model):
    prompt = random_prompts([300])[0]  # spans more than two blocks of the cache
    client.completions.create(model="smollm2", prompt=prompt, max_tokens=1)
    for options in ({"temperature": 0.0}, {"temperature": 0.5, "top_p": 0.5}):
        choice = client.completions.create(**scoring_request(prompt, **options)).choices[0]
        check(choice, prompt, model)


def test_they_make_sparse_logits(client, model):
    prompt = random_prompts([30])[0]
    returned = scores(client.completions.create(**scoring_request(prompt)).choices[0])
    ids = torch.tensor([best(position) for position in returned])
    log_probs = torch.tensor([[position[i][0] for i in best(position)] for position in returned])
    sparse = SparseLogits.from_log_probs(log_probs, ids, vocab_size=49152)
    expected = reference(model, prompt).scatter(-1, ids, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(sparse.log_tail, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_the_context_length_is_listed(client):
    listed = client.models.list().data[0]
    assert listed.id == "smollm2"
    assert listed.model_extra["max_model_len"] == 512


@pytest.mark.parametrize(
    ("request_", "parameter", "message"),
    [
        (
            scoring_request([5, 6], k=65),
            "prompt_logprobs",
            "Requested prompt logprobs of 65, which is greater than max allowed: 64",
        ),
        (
            scoring_request([5] * 513),
            "input_tokens",
            "maximum context length is 512 tokens. However, your prompt contains at least 513",
        ),
        # The generated token needs a place too.
        (scoring_request([5] * 512), "max_tokens", "max_tokens must be at least 1, got 0"),
        (scoring_request([5, 6], max_tokens=0), "max_tokens", "max_tokens must be at least 1"),
        (scoring_request([5, 49152]), None, "Token id 49152 is out of vocabulary"),
        (scoring_request([]), None, "You must pass at least one prompt"),
    ],
)
def test_refusals_say_why(client, request_, parameter, message):
    with pytest.raises(openai.BadRequestError, match="Error code: 400") as refusal:
        client.completions.create(**request_)
    assert message in refusal.value.message
    assert refusal.value.param == parameter


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="The model `other` does not exist"):
        client.completions.create(**scoring_request([5, 6], model="other"))


def test_a_wrong_key_is_refused(server_url):
    client = openai.OpenAI(base_url=server_url, api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as refusal:
        client.completions.create(**scoring_request([5, 6]))
    assert refusal.value.status_code == 401
