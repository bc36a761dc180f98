"""The memory calculator against measured peaks, and its communication against counted bytes."""

import json

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.measurement import measure
from benchmarks.problems import Problem
from opd_kernels import LazyLogits, VocabShard, distillation_loss
from opd_kernels.memory import MIB, Loss, main
from tests.collectives import SentBytes
from tests.ranks import run_ranks


def test_peaks_are_those_that_are_measured():
    """Peaks beyond the returned gradients. 24 MiB are allowed for the libraries' own memory."""
    problem = Problem(1024, 256, 151_936)
    loss = Loss(1024, 256, 151_936, dtype=torch.float32, device="cpu")
    expected = {
        "ours_one_pass": loss.one_pass(),
        "ours_full": loss.one_pass(full=True),
        "ours_recompute": loss.recompute(),
    }
    for name, result in measure(problem, expected, rounds=0).items():
        assert 0.9 * expected[name] <= result.peak_extra_bytes <= 1.15 * expected[name] + 24 * MIB


def test_16_bits_add_half_a_sum_of_dweight_on_a_cpu():
    """The first half of the sum's memory becomes the returned gradient."""
    problem = Problem(64, 1024, 200_000, dtype="bfloat16")
    expected = Loss(64, 1024, 200_000, device="cpu").one_pass()
    result = measure(problem, ["ours_one_pass"], rounds=0)["ours_one_pass"]
    assert 0.9 * expected <= result.peak_extra_bytes <= 1.15 * expected + 24 * MIB


def test_eager_peaks_are_those_that_are_measured():
    """Eager code peaks before it has gradients. The benchmark subtracts them, so they are added."""
    loss = Loss(512, 64, 50_000, dtype=torch.float32, device="cpu")
    problem = Problem(512, 64, 50_000)
    returned = (512 + 50_000) * 64 * 4
    expected = {"eager_full": loss.eager(True), "eager_topk": loss.eager(False)}
    for name, result in measure(problem, expected, rounds=0).items():
        peak = result.peak_extra_bytes + returned
        assert 0.9 * expected[name] <= peak <= 1.15 * expected[name] + 24 * MIB, name


def _counting_worker(rank, folder, ranks, full):
    torch.manual_seed(0)
    tokens, dim, vocab, k = 32, 12, 60, 7
    weights = torch.cat([torch.ones(tokens), torch.zeros(9)])  # only the kept tokens are exchanged
    hidden, weight = torch.randn(len(weights), dim, requires_grad=True), torch.randn(vocab, dim)
    rows = slice(rank * vocab // ranks, (rank + 1) * vocab // ranks)
    local = weight[rows].clone().requires_grad_()
    shard = VocabShard.from_weight(local)
    teacher = LazyLogits(torch.randn(len(weights), dim), weight[rows].clone(), shard=shard)
    options = {"k": k, "support": "full" if full else "student", "token_weights": weights}
    with SentBytes(ranks) as counted:
        student = LazyLogits(hidden, local, shard=shard)
        distillation_loss(student, teacher, **options).loss.backward()
    expected = Loss(tokens, dim, vocab, k, torch.float32, "cpu", ranks).exchanged(full)
    reduced = {name for name in expected if "sum" in name or "losses" in name}
    gathered = sum(size for name, size in expected.items() if name not in reduced)
    assert counted.sent["allgather_"] == gathered
    total = sum(expected.values())
    assert counted.sent["allreduce_"] == pytest.approx(total - gathered, rel=0.01)


@pytest.mark.parametrize(("ranks", "full"), [(2, False), (3, True)])
def test_ranks_exchange_what_the_formula_says(tmp_path, ranks, full):
    run_ranks(_counting_worker, tmp_path, ranks, full, ranks=ranks)


class _Model(torch.nn.Module):
    """A model that is only a head, with the loss inside the forward pass."""

    def __init__(self, dim, vocab):
        super().__init__()
        self.lm_head = torch.nn.Linear(dim, vocab, bias=False)

    def forward(self, hidden, teacher):
        student = LazyLogits(hidden, self.lm_head.weight)
        return distillation_loss(student, teacher, k=7).loss


def _weights_worker(rank, folder, ranks):
    tokens, dim, vocab = 32, 12, 60
    model = _Model(dim, vocab)
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    teacher = LazyLogits(torch.randn(tokens, dim), torch.randn(vocab, dim))
    model(torch.randn(tokens, dim), teacher).backward()  # FSDP sets up
    with SentBytes(ranks) as counted:
        model(torch.randn(tokens, dim), teacher).backward()
    loss = Loss(tokens, dim, vocab, 7, torch.float32, "cpu", ranks)
    expected = loss.exchanged_for_weights()
    assert counted.sent == {
        "_allgather_base_": expected["gather of the weight"],
        "_reduce_scatter_base_": expected["reduction of its gradient"],
    }


@pytest.mark.parametrize("ranks", [2, 3])
def test_fsdp_gathers_and_reduces_the_weight_once(tmp_path, ranks):
    run_ranks(_weights_worker, tmp_path, ranks, ranks=ranks)


def test_the_command_reads_a_models_config(tmp_path, monkeypatch, capsys):
    config = {"text_config": {"hidden_size": 4096, "vocab_size": 151_936}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["memory", "--model-config", str(tmp_path), "--tokens", "8192", "--ranks", "8"]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    output = capsys.readouterr().out
    logits = 8192 * 151_936 * 4 / MIB
    assert f"| eager, full vocabulary | {5 * logits:,.0f} |" in output
    assert "| a rank of 8 sends | MiB |" in output
    assert "| sum of dhidden | 224.0 |" in output
    monkeypatch.setattr("sys.argv", [*arguments[:-1], "1", "8"])
    main()
    head, sent = 4096 * 151_936 * 2 / MIB, 2 * 7 / 8 * 4096 * 151_936 * 2 / MIB
    one, eight = capsys.readouterr().out.splitlines()[-2:]
    assert one.startswith(f"| 1 | {head:,.0f} | ")
    assert one.endswith(" | 0 | 0 | 0 |")
    assert eight.startswith(f"| 8 | {head / 8:,.0f} | ")
    assert eight.endswith(f" | 242 | 18 | {sent:,.0f} |")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="has no hidden_size, vocab_size; pass --dim and --vocab"):
        main()
