"""Compiles kernels without a GPU, and reports the resources they use.

Not available under Triton's interpreter (``TRITON_INTERPRET=1``), which replaces the compiler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effattn.lowering.dialects.triton.module import module_from
from effattn.lowering.kernels import hopper, hopper_backward
from effattn.lowering.kernels.generate import file_name, generate
from effattn.lowering.kernels.linear import source as linear_source
from effattn.lowering.kernels.linear.spec import LinearSpec
from effattn.lowering.kernels.parameters import Param, kernel_constants, parameters
from effattn.lowering.kernels.selection import block_map, pick, score
from effattn.lowering.kernels.selection.block_map import MapSpec
from effattn.lowering.kernels.selection.score import ScoreSpec
from effattn.lowering.kernels.spec import KernelSpec

# architecture -> (backend, name in that backend, threads per warp, bytes of shared memory available to a program)
TARGETS: dict[str, tuple[str, Any, int, int]] = {
    "sm80": ("cuda", 80, 32, 163 * 1024),
    "sm90": ("cuda", 90, 32, 227 * 1024),
    "sm100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}


@dataclass(frozen=True)
class Resources:
    """Resources of one compiled kernel."""

    registers: int  # per thread
    spilled: int  # bytes per thread
    shared: int  # bytes per program

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.spilled} bytes spilled, {self.shared} bytes of shared memory"


def compile_for(
    spec: KernelSpec | ScoreSpec | LinearSpec | MapSpec | int, arch: str, kernel: str = "forward"
) -> Resources:
    """Compile a kernel of ``spec`` for ``arch`` (a key of ``TARGETS``), with contiguous last dimensions.

    ``spec``: of attention, a selector's scores, linear attention, a block map, or the width of a selector's pick.
    """
    compiled = compiled_for(spec, arch, kernel)
    if TARGETS[arch][0] == "hip":
        registers, spilled = _read_amd(compiled.asm["amdgcn"])
    else:
        registers, spilled = _read_nvidia(compiled.asm["cubin"])
    return Resources(registers, spilled, compiled.metadata.shared)


def compiled_for(spec: KernelSpec | ScoreSpec | LinearSpec | MapSpec | int, arch: str, kernel: str = "forward") -> Any:
    """The result of ``triton.compile``: ``.asm`` has every stage from ``ttir`` to machine code."""
    if isinstance(spec, LinearSpec):
        params, every = (
            linear_source.parameters(spec, kernel),
            {**linear_source.kernel_constants(spec), "HAS_STATE": True},
        )
        used = {param.name: every[param.name] for param in params if param.name in every}
        schedule = (spec.tiles.warps, spec.tiles.stages)
        return _compiled(linear_source.generate(spec), "linear.py", arch, kernel, params, used, schedule, ())
    if isinstance(spec, int):
        warps = pick.warps_for(spec)
        params = pick.parameters(kernel)
        constants = {"WIDTH": spec} | ({"SHARING": 4} if kernel == "choose" else {})
        return _compiled(pick.generate(spec, warps), f"pick_{spec}.py", arch, kernel, params, constants, (warps, 1), ())
    last = [f"{load.name}_stride_{load.ndim - 1}" for load in spec.attention.captures]
    if isinstance(spec, MapSpec):
        params = block_map.parameters(spec, kernel)
        return _compiled(block_map.generate(spec), "map.py", arch, kernel, params, {}, (block_map.WARPS, 1), last)
    if isinstance(spec, ScoreSpec):
        params, constants = score.parameters(spec, kernel), dict(spec.constants())
        schedule = (spec.warps, spec.stages)
        return _compiled(score.generate(spec), "score.py", arch, kernel, params, constants, schedule, last)
    source = generate(spec)
    if spec.tiles.consumers:
        return _compiled_gluon(spec, source, arch, kernel, last)
    found: dict[str, Any] = {} if kernel == "find_allowed" else dict(kernel_constants(spec))
    schedule = (spec.tiles.warps, spec.tiles.stages)
    return _compiled(source, file_name(spec, source), arch, kernel, parameters(spec, kernel), found, schedule, last)


def _compiled_gluon(spec: KernelSpec, source: str, arch: str, kernel: str, ones: Sequence[str]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    backend, architecture, lanes, _ = TARGETS[arch]
    module = module_from(source, Path(file_name(spec, source)))
    params = hopper_backward.parameters(spec, kernel) if spec.kind == "backward" else hopper.parameters(spec)
    signature = {param.name: param.type for param in params}
    signature |= {name: "constexpr" for name in ones if name in signature}
    constants = {name: 1 for name in ones if name in signature}
    ast = GluonASTSource(getattr(module, kernel), signature, constants)
    return triton.compile(ast, target=GPUTarget(backend, architecture, lanes), options=module.OPTIONS)


def _compiled(
    source: str,
    name: str,
    arch: str,
    kernel: str,
    params: list[Param],
    constants: dict[str, Any],
    schedule: tuple[int, int],
    ones: Sequence[str],
) -> Any:
    """``schedule`` is (warps, stages). Strides in ``ones``, and all that end in ``_stride_d``, are 1."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, architecture, lanes, _ = TARGETS[arch]
    module = module_from(source, Path(name))
    signature, attributes = {}, {}
    for place, param in enumerate(params):
        last_stride = param.name.endswith("_stride_d") or param.name in ones
        signature[param.name] = "constexpr" if last_stride else param.type
        if last_stride:
            constants[param.name] = 1
        elif param.type != "constexpr" and param.specialise:
            attributes[(place,)] = [["tt.divisibility", 16]]
    ast = ASTSource(getattr(module, kernel), signature, constants, attributes)
    options = {"num_warps": schedule[0], "num_stages": schedule[1]} if constants else {}
    return triton.compile(ast, target=GPUTarget(backend, architecture, lanes), options=options)


def _read_nvidia(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def _read_amd(assembly: str) -> tuple[int, int]:
    def count(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])  # type: ignore[index]

    # scalar registers spill to lanes of vector registers; only the private segment is memory
    return count("vgpr_count"), count("private_segment_fixed_size")
