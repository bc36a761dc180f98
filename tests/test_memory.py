"""The memory calculator against measured peaks, and its exchanged bytes against counted ones."""

import json

import pytest
import torch
import torch.distributed as dist

from benchmarks.measurement import measure
from benchmarks.problems import Problem
from opd_kernels import LazyLogits, VocabShard, distillation_loss
from opd_kernels.memory import MIB, Loss, main
from tests.ranks import run_ranks


def test_peaks_are_those_that_are_measured():
    """Beyond the returned gradients: what the libraries allocate comes on top."""
    problem = Problem(1024, 256, 151_936)
    loss = Loss(1024, 256, 151_936, dtype=torch.float32, device="cpu")
    expected = {
        "ours_one_pass": loss.one_pass(),
        "ours_full": loss.one_pass(full=True),
        "ours_recompute": loss.recompute(),
    }
    for name, figures in measure(problem, expected, rounds=0).items():
        assert 0.9 * expected[name] <= figures.peak_extra_bytes <= 1.15 * expected[name] + 24 * MIB


def test_eager_peaks_are_those_that_are_measured():
    """The benchmark's figure is without the gradients, which are not there yet at the peak."""
    loss = Loss(512, 64, 50_000, dtype=torch.float32, device="cpu")
    problem = Problem(512, 64, 50_000)
    returned = (512 + 50_000) * 64 * 4
    expected = {"eager_full": loss.eager(True), "eager_topk": loss.eager(False)}
    for name, figures in measure(problem, expected, rounds=0).items():
        peak = figures.peak_extra_bytes + returned
        assert 0.9 * expected[name] <= peak <= 1.15 * expected[name] + 24 * MIB, name


def _counting_worker(rank, folder, ranks, full):
    torch.manual_seed(0)
    tokens, dim, vocab, k = 32, 12, 60, 7
    hidden, weight = torch.randn(tokens, dim, requires_grad=True), torch.randn(vocab, dim)
    rows = slice(rank * vocab // ranks, (rank + 1) * vocab // ranks)
    own = weight[rows].clone().requires_grad_()
    shard = VocabShard.of(own)
    sent = {"gathered": 0, "reduced": 0}
    all_gather, all_reduce = dist.all_gather, dist.all_reduce

    def counted_gather(out, tensor, group):
        sent["gathered"] += (ranks - 1) * tensor.nbytes
        return all_gather(out, tensor, group=group)

    def counted_reduce(tensor, group):
        sent["reduced"] += 2 * (ranks - 1) * tensor.nbytes / ranks
        return all_reduce(tensor, group=group)

    dist.all_gather, dist.all_reduce = counted_gather, counted_reduce
    teacher = LazyLogits(torch.randn(tokens, dim), weight[rows].clone(), shard=shard)
    options = {"k": k, "support": "full" if full else "student"}
    distillation_loss(LazyLogits(hidden, own, shard=shard), teacher, **options).loss.backward()
    expected = Loss(tokens, dim, vocab, k, torch.float32, "cpu", ranks).exchanged(full)
    assert sum(sent.values()) == pytest.approx(sum(expected.values()), rel=0.01)
    assert sent["gathered"] == sum(v for name, v in expected.items() if "top-K" in name or
                                   "teacher" in name)  # fmt: skip


@pytest.mark.parametrize(("ranks", "full"), [(2, False), (3, True)])
def test_ranks_exchange_what_the_formula_says(tmp_path, ranks, full):
    run_ranks(_counting_worker, tmp_path, ranks, full, ranks=ranks)


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
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="has no hidden_size, vocab_size; pass --dim and --vocab"):
        main()
