"""Compile a kernel for a GPU that need not be there, and read off what it uses.

Not available under Triton's interpreter (``TRITON_INTERPRET=1``), which replaces what compiles.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effattn.lowering.triton import linear_source
from effattn.lowering.triton.linear_spec import LinearSpec
from effattn.lowering.triton.module import module_from
from effattn.lowering.triton.source import Param, file_name, generate, kernel_constants, parameters
from effattn.lowering.triton.spec import KernelSpec

# architecture -> (backend, name in that backend, lanes of a warp, bytes of shared memory that a program may use)
TARGETS: dict[str, tuple[str, Any, int, int]] = {
    "sm80": ("cuda", 80, 32, 163 * 1024),
    "sm90": ("cuda", 90, 32, 227 * 1024),
    "sm100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses on a multiprocessor."""

    registers: int  # of one thread
    spilled: int  # bytes of one thread that did not fit in registers
    shared: int  # bytes of one program

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.spilled} bytes spilled, {self.shared} bytes of shared memory"


def compile_for(spec: KernelSpec, arch: str, kernel: str = "forward") -> Resources:
    """Compile a kernel of ``spec`` for ``arch`` (a key of ``TARGETS``), with contiguous last dimensions."""
    return resources(compiled_for(spec, arch, kernel), arch)


def compiled_for(spec: KernelSpec, arch: str, kernel: str = "forward") -> Any:
    """What ``triton.compile`` returns: ``.asm`` holds every stage from ``ttir`` down to machine code."""
    source = generate(spec)
    module = module_from(source, Path(file_name(spec, source)))
    params = parameters(spec, kernel)
    constants: dict[str, Any] = {} if kernel == "find_allowed" else dict(kernel_constants(spec))
    constants |= {param.name: 1 for param in params if _is_last_stride(spec, param.name)}
    options = {"num_warps": spec.tiles.warps, "num_stages": spec.tiles.stages} if constants else {}
    return compile_function(getattr(module, kernel), params, constants, arch, options)


def linear_compiled_for(spec: LinearSpec, arch: str, kernel: str) -> Any:
    """The same for a kernel of linear attention."""
    source = linear_source.generate(spec)
    module = module_from(source, Path(linear_source.file_name(spec, source)))
    constants: dict[str, Any] = {**linear_source.kernel_constants(spec), "HAS_STATE": True}
    options = {"num_warps": spec.tiles.warps, "num_stages": spec.tiles.stages}
    return compile_function(getattr(module, kernel), linear_source.parameters(spec, kernel), constants, arch, options)


def compile_function(
    function: Any, params: list[Param], constants: dict[str, Any], arch: str, options: dict[str, int]
) -> Any:
    """Compile one function of a generated module; strides of last dimensions are 1, aligned are the others."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, name, lanes, _ = TARGETS[arch]
    constants = {**constants, **{param.name: 1 for param in params if param.name.endswith("_stride_d")}}
    constants = {name: value for name, value in constants.items() if any(param.name == name for param in params)}
    signature, attributes = {}, {}
    for place, param in enumerate(params):
        signature[param.name] = "constexpr" if param.name in constants else param.type
        if param.name not in constants and param.specialise:
            attributes[(place,)] = [["tt.divisibility", 16]]
    ast = ASTSource(function, signature, constants, attributes)
    return triton.compile(ast, target=GPUTarget(backend, name, lanes), options=options)


def resources(compiled: Any, arch: str) -> Resources:
    """What a compiled kernel uses on ``arch``."""
    if TARGETS[arch][0] == "hip":
        registers, spilled = _read_amd(compiled.asm["amdgcn"])
    else:
        registers, spilled = _read_nvidia(compiled.asm["cubin"])
    return Resources(registers, spilled, compiled.metadata.shared)


def _is_last_stride(spec: KernelSpec, name: str) -> bool:
    return any(name == f"{load.name}_stride_{load.ndim - 1}" for load in spec.plan.loads)


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

    # scalar registers spill into lanes of vector registers; only the private segment is memory
    return count("vgpr_count"), count("private_segment_fixed_size")
