"""The machine code of the Triton and CUDA kernels stays within limits and spills nothing."""

import json
import os
import subprocess
import sys

import pytest

from csrc.cuda import nvcc

pytest.importorskip("triton")
from benchmarks.audit import CASES
from benchmarks.machine_code import TARGETS, MachineCode

# Triton compiles for sm_86 and sm_89 as for sm_80, with less shared memory.
TRITON_TARGETS = ["sm_80", "sm_90", "sm_100", "sm_120"]


def audit(output, *arguments):
    """Run `python -m benchmarks audit`; returns its rows, with their code as MachineCode."""
    command = [sys.executable, "-m", "benchmarks", "audit", "--output", str(output), *arguments]
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = json.loads((output / "audit.json").read_text())
    return [row | {"code": MachineCode(**row["code"])} for row in rows]


# One test per audit: with several, each worker of pytest-xdist would compile everything again.
def test_triton(tmp_path):
    """Every shipped configuration stays within the limits of every target."""
    rows = audit(tmp_path, "--backends", "triton", "--targets", *TRITON_TARGETS)
    every_triton_kernel_is_compiled_for_every_target(rows)
    shared_memory_and_residency(rows)
    row_kernels_keep_a_row_in_registers(rows)
    matrix_products_are_on_the_tensor_cores_and_spill_nothing(rows)


@pytest.mark.skipif(nvcc.find_nvcc() is None, reason="no nvcc was found")
def test_cuda(tmp_path):
    """Every kernel compiles without a warning of nvcc or of the host compiler."""
    rows = audit(tmp_path, "--backends", "cuda")
    every_cuda_kernel_is_compiled_for_every_target_and_spills_nothing(rows)
    cuda_kernels_fill_half_of_a_multiprocessor_at_least(rows)
    cuda_kernels_move_sixteen_bytes_at_a_time(rows)


def every_triton_kernel_is_compiled_for_every_target(rows):
    assert {(row["case"], row["target"]) for row in rows} == {
        (case, target) for case in CASES for target in TRITON_TARGETS
    }
    kernels = {row["kernel"] for row in rows}
    assert kernels == {
        "update_kernel", "gradient_kernel", "divergence_kernel", "reverse_kl_kernel",
        "linear_update_kernel", "linear_gradient_kernel",
    }  # fmt: skip


def shared_memory_and_residency(rows):
    for row in rows:
        assert row["code"].shared_bytes <= TARGETS[row["target"]].shared_bytes, row
        assert row["resident_warps"] >= 8, row


def row_kernels_keep_a_row_in_registers(rows):
    for row in rows:
        if not row["kernel"].startswith("linear"):
            assert row["code"].spilled_bytes <= 16, row


def matrix_products_are_on_the_tensor_cores_and_spill_nothing(rows):
    for row in rows:
        code, is_product = row["code"], row["kernel"].startswith("linear")
        assert (code.count(TARGETS[row["target"]].tensor_instruction) > 0) == is_product, row
        if is_product:
            assert code.spilled_bytes == code.count("STL") == code.count("LDL") == 0, row


def every_cuda_kernel_is_compiled_for_every_target_and_spills_nothing(rows):
    kernels = {target: set() for target in TARGETS}
    for row in rows:
        kernels[row["target"]].add(row["case"])
        code = row["code"]
        assert code.spilled_bytes == code.count("STL") == code.count("LDL") == 0, row
        assert code.shared_bytes <= TARGETS[row["target"]].shared_bytes, row
    assert set(TARGETS) == {f"sm_{a}" for a in nvcc.ARCHITECTURES}
    assert all(names == kernels["sm_90"] for names in kernels.values())
    assert {name.partition("<")[0] for name in kernels["sm_90"]} == {
        "select_kernel", "gather_kernel", "gradient_kernel", "divergence_kernel",
        "product_kernel", "scatter_kernel", "combine_kernel",
    }  # fmt: skip
    expected = {"select_kernel<float, 8, 512>", "gradient_kernel<float, __nv_bfloat16>"}
    assert expected < kernels["sm_90"]


def cuda_kernels_fill_half_of_a_multiprocessor_at_least(rows):
    for row in rows:
        target = TARGETS[row["target"]]
        least = 0.375 if "double" in row["case"] else 0.5  # see kResidentThreads
        if row["case"].endswith("512>") and target.shared_bytes_total <= 100 * 1024:
            least -= 0.125  # lists of 512 candidates fill the shared memory
        assert row["resident_warps"] >= least * target.warps, row


def cuda_kernels_move_sixteen_bytes_at_a_time(rows):
    """Except for kernels that read one value per row, and for rows that are not aligned."""
    for row in rows:
        name, _, types = row["case"].rstrip(">").partition("<")
        reads_by_vectors = name != "combine_kernel" and not types.endswith(", 1")
        reads_by_vectors |= name in ("select_kernel", "gather_kernel")
        assert (row["code"].count("LDG", "128") > 0) == reads_by_vectors, row
        if name == "gradient_kernel":
            assert row["code"].count("STG", "128") > 0, row
