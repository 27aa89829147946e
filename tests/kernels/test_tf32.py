"""Whether float32 products may be rounded: every way in which a user can say so."""

from __future__ import annotations

import pytest
import torch
from checking import check
from plans import CASES, Sizes, tensors

from effattn.lowering.kernels.spec import Tiles
from effattn.runtime.launching import tf32
from effattn.runtime.targets import triton as triton_target

BACKENDS = torch.backends


def _all(value):
    BACKENDS.fp32_precision = value


def _cuda(value):
    BACKENDS.cudnn.fp32_precision = value  # all of CUDA, whatever its place says


def _products(value):
    BACKENDS.cuda.matmul.fp32_precision = value


def _old_flag(value):
    BACKENDS.cuda.matmul.allow_tf32 = value


def _cpu(value):
    BACKENDS.mkldnn.matmul.fp32_precision = value


@pytest.fixture(autouse=True)
def settings_restored():
    yield
    torch.set_float32_matmul_precision("highest")
    for setting in (_products, _cpu, _cuda, _all):
        setting("none")


WAYS = {
    "nothing": ([], False),
    "everything": ([(_all, "tf32")], True),
    "everything, exact": ([(_all, "ieee")], False),
    "all of CUDA": ([(_cuda, "tf32")], True),
    "products": ([(_products, "tf32")], True),
    "products, exact": ([(_products, "ieee")], False),
    "the old flag": ([(_old_flag, True)], True),
    "the old flag, off again": ([(_old_flag, True), (_old_flag, False)], False),
    "high": ([(torch.set_float32_matmul_precision, "high")], True),
    "medium": ([(torch.set_float32_matmul_precision, "medium")], True),
    "highest": ([(_products, "tf32"), (torch.set_float32_matmul_precision, "highest")], False),
    "the narrower setting counts": ([(_all, "tf32"), (_products, "ieee")], False),
    "the narrower setting counts, the other way": ([(_all, "ieee"), (_products, "tf32")], True),
    "none asks the wider setting": ([(_all, "tf32"), (_products, "ieee"), (_products, "none")], True),
    "old, then new": ([(_old_flag, True), (_products, "ieee")], False),
    "new, then old": ([(_products, "ieee"), (_old_flag, True)], True),
    "everything, beside the old flag": ([(_old_flag, True), (_all, "ieee")], True),
}


@pytest.mark.parametrize("way", WAYS)
def test_read_whichever_way_it_was_set(way):
    steps, expected = WAYS[way]
    for setting, value in steps:
        setting(value)
    assert tf32() is expected


def test_calls_follow_the_setting():
    triton_target.forget()
    sizes, config = Sizes(q_len=20, k_len=20), Tiles(16, 16, 4, 1)
    call = CASES["causal"](sizes, torch.device("cpu"))
    for value in ("none", "tf32", "ieee"):
        _all(value)
        check(call, *tensors(sizes), config=config, kind="prefill")
    assert len(triton_target.CALLS) == 2  # one kernel that rounds, one that does not
