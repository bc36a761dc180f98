"""The tuner's choices and the table that it writes, with a fake clock."""

import json

import pytest

pytest.importorskip("triton")
from benchmarks import backends, gpu, launches, tune
from opd_kernels.backends.triton import configs
from opd_kernels.backends.triton.configs import Case, RowConfig, TileConfig


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Replace the shipped table by a copy."""
    path = tmp_path / "configs.json"
    path.write_text(configs.TABLE.read_text())
    monkeypatch.setattr(configs, "TABLE", path)
    yield path
    monkeypatch.undo()
    configs._table.cache_clear()
    configs.find.cache_clear()


def test_the_fastest_configuration_that_runs_is_taken():
    small, middle, large = (RowConfig(block, 4) for block in (1024, 2048, 4096))
    times = {small: 3.0, middle: 2.0, large: None}

    def time_of(call):
        return times[call()]

    def call():
        return configs.find(Case("update", 8, True), 90)

    assert tune.fastest([small, middle, large], call, time_of) == middle
    times[middle] = 3.0
    assert tune.fastest([small, middle, large], call, time_of) == small


def test_entries_are_written_and_found_by_the_tightest_limits(table):
    before = json.loads(table.read_text())
    tight, loose = RowConfig(1024, 8), RowConfig(8192, 4)
    tile = TileConfig(64, 128, 32, 4, 2)
    cases = {
        Case("update", 128, True): loose,
        Case("update", 32, True): tight,
        Case("linear_update", 32, True, dim=1024): tile,
    }
    tune.write(89, [configs.entry_of(case, config) for case, config in cases.items()], table)
    configs._table.cache_clear()
    configs.find.cache_clear()
    after = json.loads(table.read_text())
    assert {name: after[name] for name in before} == before
    for k, config in ((1, tight), (32, tight), (33, loose), (128, loose)):
        assert configs.find(Case("update", k, True), 89) == config
    shipped = configs.find(Case("update", 129, True), 80)
    assert configs.find(Case("update", 129, True), 89) == shipped
    assert configs.find(Case("update", 32, False), 89) == configs.find(Case("update", 32, False), 0)
    assert configs.find(Case("linear_update", 8, True, dim=576), 89) == tile
    assert configs.find(Case("linear_update", 8, True, dim=2048), 89) != tile
    assert configs.find(Case("update", 32, True), 90) != tight  # the entry is of another GPU


def test_every_tuned_case_has_a_call_and_a_shipped_configuration():
    cases = tune.cases()
    assert {case.kernel for case in cases} == {
        "update", "gradient", "divergence", "linear_update", "linear_gradient",
    }  # fmt: skip
    for case in cases:
        config = configs.find(case, 90)
        assert isinstance(config, TileConfig) == case.kernel.startswith("linear")
        assert config in tune.candidates_of(config)


def test_an_unknown_kernel_raises():
    with pytest.raises(KeyError, match="no configuration of Case"):
        configs.find(Case("other", 1, True), 90)


def test_backends_are_compared_on_the_same_calls(monkeypatch, gpu_backend):
    monkeypatch.setattr(launches, "TOKENS", 2)
    monkeypatch.setattr(launches, "VOCAB", 150)
    monkeypatch.setattr(backends, "CANDIDATES", (gpu_backend, "torch", "not installed"))
    clock = iter(range(1, 1000))

    def time_of(call):
        call()
        return next(clock) / 1e3

    timings = backends.measure("cpu", 3, time_of)
    assert [t.epilogue for t in timings] == list(backends.EPILOGUES)
    assert timings[0].seconds == {
        gpu_backend: 3e-3,
        "torch": 4e-3,
    }  # medians of 1, 3, 5 and of 2, 4, 6
    table = backends.section(timings).splitlines()
    assert table[2].startswith(f"| epilogue | {gpu_backend} ms (GB/s) | torch ms (GB/s) |")
    assert table[4] == "| select K=20 | 3 (0) | 4 (0) | 1.33 |"


def test_report_and_its_name():
    text = gpu.report("NVIDIA X", False, "1 failed", ["**a table**"])
    assert "FAILED" in text
    assert "1 failed" in text
    assert text.endswith("**a table**\n")
    assert gpu.file_name("NVIDIA H100 80GB HBM3") == "gpu-nvidia-h100-80gb-hbm3.md"
