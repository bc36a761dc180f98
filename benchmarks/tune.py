"""Tune the launch configurations of the Triton kernels on this GPU, and write them to the table.

For each case the fastest candidate without register spills is taken. The entries replace those of
this GPU's compute capability in opd_kernels/backends/triton/configs.json.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm

from benchmarks import launches
from benchmarks.measurement import require_gpu
from opd_kernels.backends.triton import configs
from opd_kernels.backends.triton.configs import Case, Config, RowConfig, TileConfig

_ROWS = [RowConfig(block, warps) for block, warps in product((1024, 2048, 4096, 8192), (4, 8))]
_TILES = [TileConfig(*sizes) for sizes in product((128,), (128, 256), (32, 64), (4, 8), (2, 3, 4))]
_KS = (1, 32, configs.MAX_FUSED, configs.MAX_SELECTED, configs.MAX_GIVEN)
_DIMS = (576, 1_024, 2_048)

Builder = Callable[..., launches.Call]  # takes the device
# Returns the milliseconds of a call, or None if its configuration does not fit the GPU.
Timer = Callable[[launches.Call], float | None]


def cases() -> dict[Case, Builder]:
    """Return the cases to tune, each with a function that builds its call."""
    calls: dict[Case, Builder] = {}
    for plain, k in product((True, False), _KS):
        selects = k <= configs.MAX_SELECTED
        calls[Case("update", k, plain)] = partial(launches.update, k, selects, plain)
        calls[Case("gradient", k, plain)] = partial(launches.gradient, k, plain)
        for dim in _DIMS if k <= configs.MAX_FUSED else ():
            for build in (launches.linear_update, launches.linear_gradient):
                calls[Case(build.__name__, k, plain, dim)] = partial(build, k, plain, dim=dim)
    for plain in (True, False):
        beta = 1.0 if plain else 0.5
        calls[Case("divergence", 0, plain)] = partial(launches.divergence, beta, plain)
    return calls


def candidates_of(current: Config) -> list[Config]:
    """Return the configurations to try, the current one first, so that it wins ties."""
    others: Iterable[Config] = _TILES if isinstance(current, TileConfig) else _ROWS
    return [current, *(other for other in others if other != current)]


def fastest(candidates: list[Config], call: launches.Call, time_of: Timer) -> Config:
    """Return the fastest configuration of a call; the first one on ties or if none runs."""
    times: dict[Config, float] = {}
    for config in candidates:
        with patch.object(configs, "find", lambda *_, config=config: config):
            milliseconds = time_of(call)
        if milliseconds is not None:
            times[config] = milliseconds
    return min(times, key=lambda config: times[config], default=candidates[0])


def milliseconds(call: launches.Call) -> float | None:
    """Return the median time of a call, repeated for 200 ms on the GPU."""
    from triton import testing
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    try:
        if _spills(call):
            return None
        return testing.do_bench(call, warmup=50, rep=200, return_mode="median")
    except (OutOfResources, CompilationError):
        return None
    except RuntimeError as error:  # a compiler pass that fails; any other error is a bug of ours
        if "PassManager" not in str(error):
            raise
        return None


def _spills(call: launches.Call) -> bool:
    """Return whether a kernel that the call launches spills registers."""
    from triton.runtime.jit import JITFunction

    compiled, launch = [], JITFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled.append(launch(self, *args, **kwargs))
        return compiled[-1]

    with patch.object(JITFunction, "run", run):
        call()
    return any(kernel.n_spills > 0 for kernel in compiled)


def write(capability: int, entries: list[dict[str, Any]], path: Path) -> None:
    """Replace a capability's entries in the table, one per line; the tightest limits come first."""
    table = json.loads(path.read_text())
    entries.sort(key=lambda e: (e["kernel"], e["plain"], e.get("dim", 0), e.get("k", 0)))
    table[str(capability)] = entries
    blocks = []
    for name in sorted(table, key=int):
        lines = ",\n".join(f"    {json.dumps(entry)}" for entry in table[name])
        blocks.append(f'  "{name}": [\n{lines}\n  ]')
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("tune", help="tune the Triton kernels on this GPU")
    parser.add_argument("--table", type=Path, default=configs.TABLE)
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Tune every case and write the table."""
    require_gpu("tune")
    tune(arguments.table)


def tune(path: Path) -> None:
    """Tune every case on the GPU and write the entries to the table at path."""
    entries, capability = [], configs.capability(torch.device("cuda"))
    for case, build in tqdm(cases().items(), desc="tuning"):
        candidates = candidates_of(configs.find(case, capability))
        config = fastest(candidates, build(device="cuda"), milliseconds)
        entries.append(configs.entry_of(case, config))
        write(capability, entries, path)
