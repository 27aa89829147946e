"""The generated text: three golden files, names, what is shared, how it is loaded."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jinja2
import pytest
import torch
from checking import check
from plans import CASES, Sizes, tensors
from specs import goldens, on_hopper, spec

from effattn.lowering.kernels.generate import file_name, generate
from effattn.lowering.kernels.spec import Tiles
from effattn.runtime import kernels
from effattn.runtime.targets import triton as triton_target
from effattn.runtime.targets.triton.specialise import spec_of

GOLDENS = Path(__file__).parents[2] / "goldens" / "kernels"
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", goldens())
def test_golden(name):
    """Accept a change on purpose with EFFATTN_ACCEPT=1."""
    path = GOLDENS / f"{name}.py.golden"
    source = generate(goldens()[name])
    if os.environ.get("EFFATTN_ACCEPT"):
        path.write_text(source)
    assert source == path.read_text()


def test_source_does_not_depend_on_the_process():
    script = "from specs import *; from effattn.lowering.kernels.generate import *\n"
    script += "found = [listed('sm90', 'proxy'), *(spec(name, 'sm90') for name in PREFILL)]\n"
    script += "print([file_name(one, generate(one)) for one in found])"
    seen = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


def test_templates_are_read_once(monkeypatch):
    plans = [CASES[name](Sizes(head_dim=dim), CPU).plan for name in ("power_16", "alibi") for dim in (30, 31, 32, 33)]
    causal = spec("causal", "sm90")
    specs = [replace(causal, attention=plan.spec, tiles=Tiles(16, 16, 4, 1)) for plan in plans]
    generate(specs[0])
    monkeypatch.delattr(jinja2.Environment, "compile")
    assert len({generate(one) for one in specs[1:]}) == len(specs[1:])


def test_file_names_are_readable():
    one = spec("power_128", "sm90")
    source = generate(one)
    assert re.fullmatch(r"power_causal_bf16_d128_g4_[0-9a-f]{8}\.py", file_name(one, source))
    assert source.startswith("# effattn kernel")
    assert "is_power_of_two" in source.split("import triton")[0]
    other = spec("left_padding", "sm90", "decode", dim=96, value_dim=64)
    assert file_name(other, generate(other)).startswith("exact_masked_decode_bf16_d96x64_g4_")


def test_plans_that_differ_outside_the_kernel_share_it():
    plan = CASES["causal"](Sizes(), CPU).plan
    other = plan.dispatched(layout="bnhd", target="triton", min_length=9, lse_is_read=False)
    assert other != plan
    specs = [spec_of(one, torch.bfloat16, 57, 1, 16, 16, CPU, "prefill") for one in (plan, other)]
    assert specs[0] == specs[1]
    assert kernels.load(specs[0]) is kernels.load(specs[1])


def _forget():
    kernels.load.cache_clear()
    triton_target.forget()


def test_a_file_that_was_tampered_with_is_never_run(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFATTN_CACHE_DIR", str(tmp_path / "cache"))
    sizes = Sizes(q_len=19, k_len=19)
    call = CASES["window"](sizes, CPU)
    _forget()
    check(call, *tensors(sizes), config=Tiles(16, 16, 4, 1), kind="prefill")
    (path,) = (tmp_path / "cache").rglob("*.py")
    wanted = path.read_text()
    for damage in ("raise SystemExit('ran')\n", wanted[: len(wanted) // 2], ""):
        path.write_text(damage)
        _forget()
        check(call, *tensors(sizes), config=Tiles(16, 16, 4, 1), kind="prefill")
        assert path.read_text() == wanted
    path.write_text("raise SystemExit('ran')\n")  # while the kernel is loaded
    check(call, *tensors(sizes), config=Tiles(16, 16, 4, 1), kind="prefill")


def test_triton_sees_the_text_in_memory(tmp_path):
    source = generate(spec("causal", "sm90"))
    path = tmp_path / "never_written.py"
    module = kernels.module_from(source, path)
    assert not path.exists()
    text = inspect.getsource(module.forward.fn)
    assert text in source
    assert "tl.dot" in text


def test_large_scores_are_not_scaled_before_the_greatest_is_taken_away():
    """The lowest float times log2(e) is -inf, and -inf from -inf is NaN."""
    biased = generate(on_hopper("bias", 128, kind="listed"))
    assert "exp2((scores - base[:, None]) * SCALE)" in biased
    assert "top + gl.log2(total)" in biased
    for name in ("causal", "soft_cap", "alibi"):
        assert "exp2(scores * SCALE - (base * SCALE)[:, None])" in generate(on_hopper(name, 128))
