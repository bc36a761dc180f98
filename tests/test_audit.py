"""The machine code of the Triton kernels: within limits, without spills, on the tensor cores."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What `python -m benchmarks audit` reports of every shipped configuration."""
    output = tmp_path_factory.mktemp("audit")
    command = [sys.executable, "-m", "benchmarks", "audit", "--output", str(output)]
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads((output / "audit.json").read_text())


def test_every_kernel_is_compiled_for_every_target(rows):
    from benchmarks.audit import CASES
    from benchmarks.machine_code import TARGETS

    assert {(row["case"], row["target"]) for row in rows} == {
        (case, target) for case in CASES for target in TARGETS
    }
    kernels = {row["kernel"] for row in rows}
    assert kernels == {
        "update_kernel", "gradient_kernel", "divergence_kernel", "reverse_kl_kernel",
        "linear_update_kernel", "linear_gradient_kernel",
    }  # fmt: skip


def test_shared_memory_and_residency(rows):
    from benchmarks.machine_code import TARGETS

    for row in rows:
        assert row["code"]["shared_bytes"] <= TARGETS[row["target"]].shared_bytes, row
        assert row["resident_warps"] >= 8, row


def test_row_kernels_keep_a_row_in_registers(rows):
    for row in rows:
        if not row["kernel"].startswith("linear"):
            assert row["code"]["spilled_bytes"] <= 16, row


def test_matrix_products_are_on_the_tensor_cores_and_spill_nothing(rows):
    from benchmarks.machine_code import TARGETS

    for row in rows:
        instructions = row["code"]["instructions"]
        tensor = TARGETS[row["target"]].tensor_instruction
        assert (instructions.get(tensor, 0) > 0) == row["kernel"].startswith("linear"), row
        if row["kernel"].startswith("linear"):
            assert row["code"]["spilled_bytes"] == 0, row
            assert "STL" not in instructions, row
            assert "LDL" not in instructions, row
