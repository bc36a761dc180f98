"""Threads that share a model do not see each other's calls of lazy_logits."""

import asyncio
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from torch.testing import assert_close

from opd_kernels.integrations.labels import patch
from opd_kernels.integrations.transformers import call_with_lazy_logits, lazy_logits
from tests.tiny_models import tiny_batch, tiny_model


@pytest.fixture(autouse=True)
def frequent_switches():
    """Threads take turns after every few bytecodes."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def logits_of(model, ids, mask):
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits


def lazily(model, ids, mask):
    with torch.no_grad():
        return lazy_logits(model, ids, mask).materialize()


def fails(model, ids, mask):
    with pytest.raises(ZeroDivisionError):
        call_with_lazy_logits(model, lambda logits: 1 / 0, ids, mask)
    return logits_of(model, ids, mask)


def test_every_call_of_every_thread_gives_its_own_logits():
    """120 calls from 6 threads, on two models, with failures and ordinary calls between them."""
    models = [tiny_model("llama"), tiny_model("gemma2", seed=1)]
    batches = [tiny_batch(rows=2 + n) for n in range(4)]
    expected = {
        (m, b): logits_of(models[m], *batches[b]) for m in range(2) for b in range(len(batches))
    }

    def call(n):
        m, b = n % 2, n % len(batches)
        function = (lazily, lazily, logits_of, lazily, fails)[n % 5]
        return function(models[m], *batches[b]), expected[m, b]

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(call, range(120)))
    assert len(results) == 120
    for actual, logits in results:
        assert_close(actual, logits, rtol=1e-5, atol=1e-5)
    for model in models:
        for module in (model, model.lm_head):
            assert "forward" not in module.__dict__
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


def test_a_thread_samples_while_another_computes_a_loss():
    """Both threads use one model; the gradient is that of a call alone."""
    model, (ids, mask) = tiny_model("llama"), tiny_batch()
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    sampled = model.generate(ids[:1, :4], **options)

    def gradient(_):
        loss = lazy_logits(model, ids, mask).log_prob(ids).sum()
        return torch.autograd.grad(loss, model.lm_head.weight)[0]

    expected = gradient(0)
    with ThreadPoolExecutor(2) as pool:
        samples = pool.map(lambda _: model.generate(ids[:1, :4], **options), range(4))
        gradients = pool.map(gradient, range(20))
        assert all(torch.equal(ids, sampled) for ids in samples)
        for actual in gradients:
            assert torch.equal(actual, expected)


def test_other_threads_see_the_ordinary_model_during_a_loss():
    """Its forward method, copies, pickles and outputs are the same as before."""
    model, (ids, mask) = tiny_model("llama"), tiny_batch()
    expected, forward = logits_of(model, ids, mask), model.forward
    with ThreadPoolExecutor(1) as pool:

        def look():
            assert model.forward == forward
            assert "forward" not in model.lm_head.__dict__
            copies = deepcopy(model), pickle.loads(pickle.dumps(model))
            return [logits_of(x, ids, mask) for x in (model, *copies)]

        def loss(logits):
            return pool.submit(look).result(), logits.materialize()

        others, own = call_with_lazy_logits(model, loss, ids, mask)
    assert_close(own, expected, rtol=1e-5, atol=1e-5)
    for logits in others:
        assert torch.equal(logits, expected)


def test_a_thread_that_is_inside_the_decoder_captures_nothing_of_another():
    """A hook of the decoder calls the model in this thread's own forward pass, and in another."""
    model, (ids, mask) = tiny_model("llama"), tiny_batch()
    expected, nested = logits_of(model, ids, mask), []
    with ThreadPoolExecutor(1) as pool:

        def inside(*_):
            if not nested:
                nested.append(None)
                nested.append(pool.submit(logits_of, model, ids, mask).result())
                nested.append(pool.submit(lazily, model, ids, mask).result())
                nested.append(lazily(model, ids, mask))

        handle = model.model.layers[0].register_forward_hook(inside)
        actual = lazily(model, ids, mask)
        handle.remove()
    for logits in (actual, *nested[1:]):
        assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_loss_may_call_its_own_model():
    """As self-distillation does: with lazy logits, with full logits, and in an event loop."""
    model, (ids, mask) = tiny_model("llama"), tiny_batch()
    expected = logits_of(model, ids, mask)

    async def in_loop():
        return await asyncio.gather(*[asyncio.to_thread(lazily, model, ids, mask)] * 1)

    def loss(logits):
        teacher = lazily(model, ids, mask)
        return logits.materialize(), teacher, logits_of(model, ids, mask), *asyncio.run(in_loop())

    for logits in call_with_lazy_logits(model, loss, ids, mask):
        assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_function_may_return_none():
    model, (ids, mask) = tiny_model("llama"), tiny_batch()
    seen = []
    assert call_with_lazy_logits(model, seen.append, ids, mask) is None
    assert_close(seen[0].materialize(), logits_of(model, ids, mask), rtol=1e-5, atol=1e-5)


def test_a_model_is_whole_after_an_exception_anywhere():
    """In the decoder, before the head, after it, and in the loss."""
    model, (ids, mask) = tiny_model("llama"), tiny_batch()
    expected = logits_of(model, ids, mask)

    def interrupt(*_):
        raise KeyboardInterrupt

    def loss(logits):
        raise KeyboardInterrupt

    for register in (
        model.model.layers[1].register_forward_hook,
        model.lm_head.register_forward_pre_hook,
        model.lm_head.register_forward_hook,
        model.register_forward_hook,
    ):
        handle = register(interrupt)
        with pytest.raises(KeyboardInterrupt):
            lazy_logits(model, ids, mask)
        handle.remove()
        assert torch.equal(logits_of(model, ids, mask), expected)
    with pytest.raises(KeyboardInterrupt):
        call_with_lazy_logits(model, loss, ids, mask)
    assert torch.equal(logits_of(model, ids, mask), expected)
    assert_close(lazily(model, ids, mask), expected, rtol=1e-5, atol=1e-5)


def test_patched_models_are_shared_by_threads_too():
    model, (ids, _) = patch(tiny_model("llama")), tiny_batch()
    loss, logits = model(ids, labels=ids).loss, model(ids).logits

    def call(n):
        return model(ids, labels=ids).loss if n % 2 else model(ids).logits

    with ThreadPoolExecutor(4) as pool:
        for n, result in enumerate(pool.map(call, range(60))):
            assert_close(result, loss if n % 2 else logits)


def compiled_in_place(model):
    model.compile(backend="eager")


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")


def compiled_head(model):
    model.lm_head = torch.compile(model.lm_head, backend="eager")


def compiled_head_in_place(model):
    model.lm_head.compile(backend="eager")


@pytest.mark.parametrize(
    "compile_model", [compiled_in_place, compiled_forward, compiled_head, compiled_head_in_place]
)
def test_a_model_that_ran_compiled_before(compile_model):
    """Hooks that are added after torch.compile has traced a module do not run in its graph."""
    model, (ids, mask) = tiny_model("llama"), tiny_batch()
    expected = logits_of(model, ids, mask)
    compile_model(model)
    for _ in range(2):
        assert_close(logits_of(model, ids, mask), expected, rtol=1e-5, atol=1e-5)
        assert_close(lazily(model, ids, mask), expected, rtol=1e-5, atol=1e-5)
