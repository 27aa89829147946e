"""Compile every listed kernel for one architecture; print what each uses as JSON. Runs without the interpreter."""

from __future__ import annotations

import json
import sys

import linear_specs
import specs

from effattn.lowering.kernels.offline import TARGETS, compile_for


def main(wanted: str) -> None:
    found = {}
    for name, (spec, arch, kernel) in {**specs.compiled(), **linear_specs.compiled()}.items():
        if arch == wanted:
            used = compile_for(spec, arch, kernel)
            found[name] = [used.registers, used.spilled, used.shared, TARGETS[arch][3]]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
