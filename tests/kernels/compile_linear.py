"""Compile every listed kernel of linear attention and print what each uses as JSON, without Triton's interpreter."""

from __future__ import annotations

import json

from linear_specs import compiled

from effattn.lowering.kernels.offline import TARGETS, compile_for


def main() -> None:
    found = {}
    for name, (spec, arch, kernel) in compiled().items():
        used = compile_for(spec, arch, kernel)
        found[name] = [used.registers, used.spilled, used.shared, TARGETS[arch][3]]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
