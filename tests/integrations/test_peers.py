"""The drop-in losses compute the same as the original packages, with the same calls."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from opd_kernels import reverse_kl
from opd_kernels.integrations import liger as ours
from tests.reference import make_logits


def _operands(tokens=23, vocab=61):
    torch.manual_seed(0)
    student = make_logits(tokens=tokens, vocab=vocab, padded=0, dtype=torch.float32)
    teacher = make_logits(tokens=tokens, dim=9, vocab=vocab, padded=0, dtype=torch.float32)
    labels = torch.randint(0, vocab, (tokens,)).masked_fill(torch.arange(tokens) % 4 == 0, -100)
    operands = (student.hidden, student.weight, teacher.hidden.detach(), teacher.weight.detach())
    return operands, labels, (student.bias, teacher.bias.detach())


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 1.0), (2.0, 0.1)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_ligers_chunked_jsd(beta, weights, with_bias):
    peer = pytest.importorskip("liger_kernel.chunked_loss")
    operands, labels, biases = _operands()
    options = {"weight_hard_loss": weights[0], "weight_soft_loss": weights[1], "beta": beta}
    options |= {"temperature": 1.7, "compiled": False, "return_soft_hard_loss": True}
    results = []
    for package in (peer, ours):
        module = package.LigerFusedLinearJSDLoss(**options)
        parts = module(*operands, labels, *(biases if with_bias else ()))
        leaves = [operands[0], operands[1], *([biases[0]] if with_bias else [])]
        results.append((parts, torch.autograd.grad(parts[0], leaves)))
    assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-6)
    options["return_soft_hard_loss"] = False
    assert_close(
        ours.LigerFusedLinearJSDLoss(**options)(*operands, labels, *(biases if with_bias else ())),
        results[1][0][0],
    )


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_ligers_fused_linear_jsd(beta):
    """Compared with the definition, since Liger-Kernel's is a Triton kernel for GPUs."""
    operands, labels, _ = _operands()
    log_p = (operands[0] @ operands[1].T / 0.8).log_softmax(-1)
    log_q = (operands[2] @ operands[3].T / 0.8).log_softmax(-1)
    if beta in (0.0, 1.0):
        first, second = (log_p, log_q) if beta else (log_q, log_p)
        per_token = (first.exp() * (first - second)).sum(-1)
    else:
        log_m = torch.log((1 - beta) * log_p.exp() + beta * log_q.exp())
        per_token = (1 - beta) * (log_p.exp() * (log_p - log_m)).sum(-1)
        per_token = per_token + beta * (log_q.exp() * (log_q - log_m)).sum(-1)
    module = ours.LigerFusedLinearJSD(jsd_beta=beta, temperature=0.8)
    counted = labels != -100
    for shift_labels, expected in ((labels, per_token[counted].mean()), (None, per_token.mean())):
        loss = module(*operands, shift_labels)
        assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        gradients = [
            torch.autograd.grad(x, operands[:2], retain_graph=True) for x in (loss, expected)
        ]
        assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_support_of_k_ids_in_ligers_place():
    operands, labels, _ = _operands()
    options = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": 1.0}
    full = ours.LigerFusedLinearJSDLoss(**options)(*operands, labels)
    cut = ours.LigerFusedLinearJSDLoss(**options, support="student", k=61, objective=reverse_kl)
    assert_close(cut(*operands, labels), full, rtol=1e-5, atol=1e-6)
    few = ours.LigerFusedLinearJSDLoss(**options, support="student", k=3, objective=reverse_kl)
    assert (few(*operands, labels) - full).abs() > 1e-2


def test_a_padded_teacher_is_cut_where_liger_pads_the_student():
    operands, labels, _ = _operands()
    padded = torch.cat([operands[3], torch.randn(3, 9)])  # to a multiple of 8
    options = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": 1.0}
    expected = ours.LigerFusedLinearJSDLoss(**options)(*operands, labels)
    assert_close(ours.LigerFusedLinearJSDLoss(**options)(*operands[:3], padded, labels), expected)


def _trl_trainer(folder, beta):
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    from tests.tiny_models import tiny_model
    from tests.tiny_run import tiny_tokenizer

    config = DistillationConfig(
        output_dir=str(folder), beta=beta, bf16=False, use_cpu=True, max_steps=2, report_to="none",
        per_device_train_batch_size=4, max_completion_length=6, temperature=0.8, logging_steps=1,
        learning_rate=1e-3, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": f"say {i}"} for i in range(8)])
    models = tiny_model("gemma2"), tiny_model("gemma2", seed=1, hidden_size=24)
    torch.manual_seed(3)
    return DistillationTrainer(
        *models, config, train_dataset=data, processing_class=tiny_tokenizer()
    )


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_trls_trainer_learns_the_same(tmp_path, beta):
    pytest.importorskip("trl")
    from opd_kernels.integrations.trl import distil_with

    results = []
    for plug in (lambda trainer: trainer, distil_with):
        trainer = plug(_trl_trainer(tmp_path, beta))
        trainer.train()
        lines = [x for x in trainer.state.log_history if "loss" in x]
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        results.append((lines, weights))
    (theirs, expected), (lines, weights) = results
    assert len(lines) == 2
    for a, e in zip(lines, theirs, strict=True):
        assert a["loss"] == pytest.approx(e["loss"], rel=1e-4)
        assert a["entropy"] == pytest.approx(e["entropy"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(e["grad_norm"], rel=1e-3)
    for name, weight in expected.items():
        assert_close(weights[name], weight, rtol=1e-3, atol=2e-4)


def test_trls_trainer_with_the_top_k(tmp_path):
    pytest.importorskip("trl")
    from trl.trainer import distillation_trainer

    from opd_kernels.integrations.trl import distil_with

    before = distillation_trainer._chunked_divergence_loss
    objective = partial(reverse_kl, tail="bucket")
    trainer = distil_with(_trl_trainer(tmp_path, 1.0), support="student", k=3, objective=objective)
    trainer.train()
    assert distillation_trainer._chunked_divergence_loss is before
    cut = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    full = distil_with(_trl_trainer(tmp_path, 1.0))
    full.train()
    exact = [x["loss"] for x in full.state.log_history if "loss" in x]
    assert 0 < cut[0] < exact[0]  # merging outcomes reduces a KL
