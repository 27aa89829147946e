"""Generated kernels on a real GPU: right numbers first, then their time beside SDPA and FlexAttention.

    python benchmarks/kernels_check.py --out kernels.json [--part check,time,decode,backward] [--workers 10]
    python benchmarks/kernels_check.py --quick --out kernels.json    (default and best candidates only, 100 s)

Everything is compiled (and checked) in a pool of processes; then one process times, so that peers and kernels are
measured in the same run. A variant that fails is printed and left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
ALL_HEADS = 1 << 20
LENGTHS = (8192, 32768, 131072)
MASKS = ("causal", "padding", "power", "window")  # padding: nothing is padded; left: a quarter is
QUICK_MASKS = ("causal", "padding", "left", "power", "window")
QUICK_LENGTHS = (32768, 131072)
QUICK_SECONDS = 95
BLOCK, WINDOW, SINKS = 128, 2048, 128


def configs():
    from effattn.lowering.kernels.spec import Tiles

    return {
        "default": None,
        "64 w8 s3": Tiles(128, 64, 8, 3),
        "64 w8 s3 edge1": Tiles(128, 64, 8, 3, partial_stages=1),
        "64 w8 s3 heads": Tiles(128, 64, 8, 3, heads_together=ALL_HEADS),
        "64 w8 s3 head": Tiles(128, 64, 8, 3, heads_together=1),
        "64 w8 s4": Tiles(128, 64, 8, 4),
        "64 w4 s3": Tiles(128, 64, 4, 3),
        "128 w8 s2": Tiles(128, 128, 8, 2),
        "64x64 w4 s3": Tiles(64, 64, 4, 3),
        "tma 64 w8 s3": Tiles(128, 64, 8, 3, descriptors=True),
        "tma 64 w8 s4": Tiles(128, 64, 8, 4, descriptors=True),
        "tma 128 w8 s2": Tiles(128, 128, 8, 2, descriptors=True),
        "tma 128 w8 s2 heads": Tiles(128, 128, 8, 2, descriptors=True, heads_together=ALL_HEADS),
    }


def quick_configs(mask: str):
    """What the tables choose and the three candidates that came closest."""
    from effattn.lowering.kernels.spec import Tiles

    tma = {"tma 128 w8 s2": Tiles(128, 128, 8, 2, descriptors=True)}
    small = {"64x64 w4 s3": Tiles(64, 64, 4, 3)}
    one = {"64 w8 s3 head": Tiles(128, 64, 8, 3, heads_together=1)}
    return {
        "causal": {"default": None, **one, "64 w8 s3 2 groups": Tiles(128, 64, 8, 3, heads_together=8), **tma},
        "padding": {"default": None, **one, **tma, **small},
        "left": {"default": None, **tma},
        "power": {
            "default": None,
            "128 w8 s2 head": Tiles(128, 128, 8, 2, heads_together=1),
            "128 w8 s2 2 groups": Tiles(128, 128, 8, 2, heads_together=8),
            **tma,
        },
        "window": {"default": None, "64 w8 s3": Tiles(128, 64, 8, 3), **one, **tma},
    }[mask]


# --- right numbers -----------------------------------------------------------------------------------------------


def check_jobs():
    from plans import CASES

    jobs = [(name, kind, "bfloat16", 128, 128) for name in CASES for kind in ("prefill", "decode")]
    for dtype, dim, value_dim in (("float16", 64, 64), ("float32", 64, 64), ("bfloat16", 60, 60), ("bfloat16", 96, 80)):
        jobs += [(name, "prefill", dtype, dim, value_dim) for name in ("causal", "power_32_no_sinks")]
        jobs += [("cache_by_pointer", "decode", dtype, dim, value_dim)]
    jobs += [("causal", "prefill", "bfloat16", 256, 256), ("cache_by_pointer", "decode", "bfloat16", 256, 256)]
    for name in ("causal", "left_padding", "documents", "window_and_sinks", "alibi", "empty_rows_mean", "none"):
        jobs.append((name, "backward", "bfloat16", 128, 128))
    jobs += [("causal", "backward", "float32", 64, 64), ("causal", "backward", "bfloat16", 96, 80)]
    jobs += [("holes", kind, "bfloat16", 128, 128) for kind in ("prefill", "decode", "backward")]
    jobs += [("power of 128", "prefill", "bfloat16", 128, 128), ("descriptors", "prefill", "bfloat16", 128, 128)]
    return jobs


def built(name: str, sizes, device):
    """A call of the tests' table; "holes": keys that may be attended to are not consecutive."""
    from plans import CASES

    call = CASES["left_padding" if name == "holes" else name](sizes, device)
    if name == "holes":
        call.captures[0][:, 40:50] = False
        call.captures[0][:, ::7] = False
    return call


def check_one(job) -> dict:
    """The largest error of output and LSE against float64."""
    from plans import CASES, CAUSAL, Call, Sizes, power_keep, s, tensors

    from effattn.ir.attention import AttentionSpec
    from effattn.ir.plan import Plan
    from effattn.lowering.kernels.spec import Tiles
    from effattn.runtime.reference.attention import reference
    from effattn.runtime.targets import triton as triton_target

    name, kind, dtype, dim, value_dim = job
    if kind == "backward":
        return check_backward(job)
    length = 1500 if name in ("power of 128", "descriptors") else 333
    sizes = Sizes(2, 8, 2, 1 if kind == "decode" else length, length, dim, value_dim)
    device = torch.device("cuda")
    config = None
    if name in CASES or name == "holes":
        call = built(name, sizes, device)
    else:
        call = Call(Plan("power", AttentionSpec(sizes.scale * s, CAUSAL, power_keep(128, 256, 128))))
        config = Tiles(128, 64, 8, 3, descriptors=True) if name == "descriptors" else None
    query, key, value = tensors(sizes, device, getattr(torch, dtype), order="bnhd")
    out, lse = triton_target.run(
        call.plan, query, key, value, call.captures, call.scalars, call.numbers, kind=kind, config=config
    )
    wanted, wanted_lse = reference(call.plan, query, key, value, call.captures, call.scalars, call.numbers)
    assert out.shape == (sizes.batch, sizes.heads, sizes.q_len, sizes.value_dim)
    out_error = torch.nan_to_num((out.double() - wanted).abs()).max().item()
    same_nan = bool((out.isnan() == wanted.isnan()).all())
    both = wanted_lse.isfinite()
    lse_error = (lse.double() - wanted_lse)[both].abs().max().item() if both.any() else 0.0
    infinite = bool((lse.isneginf() == wanted_lse.isneginf()).all())
    limits = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
    largest = max(1.0, wanted_lse[both].abs().max().item()) if both.any() else 1.0
    good = out_error < limits[dtype] and lse_error < 1e-3 * largest
    return {"job": job, "out": out_error, "lse": lse_error, "good": bool(good and same_nan and infinite)}


def check_backward(job) -> dict:
    """The largest relative error of the three gradients against autograd in float64."""
    from plans import Sizes, tensors

    from effattn.runtime.reference.attention import reference
    from effattn.runtime.targets import triton as triton_target

    name, _, dtype, dim, value_dim = job
    sizes = Sizes(2, 8, 2, 333, 333, dim, value_dim)
    call = built(name, sizes, torch.device("cuda"))
    inputs = tensors(sizes, "cuda", getattr(torch, dtype), order="bnhd")
    data = (call.captures, call.scalars, call.numbers)
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    wanted, _ = reference(call.plan, *leaves, *data)
    grad_out = torch.randn_like(wanted).to(inputs[0].dtype)
    wanted.backward(grad_out.double())
    out, lse = triton_target.run(call.plan, *inputs, *data, kind="prefill")
    grads = triton_target.run_backward(call.plan, grad_out, None, *inputs, out, lse, *data)
    errors = [
        ((grad.double() - leaf.grad).abs().max() / leaf.grad.abs().max()).item()
        for grad, leaf in zip(grads, leaves, strict=True)
    ]
    return {"job": job, "out": max(errors), "lse": 0.0, "good": max(errors) < (1e-4 if dtype == "float32" else 3e-2)}


# --- time --------------------------------------------------------------------------------------------------------


def inputs(length: int, batch: int = 1, q_len: int | None = None):
    make = torch.Generator("cuda").manual_seed(1)
    shapes = [(batch, HEADS, q_len or length), *[(batch, KV_HEADS, length)] * 2]
    return [torch.randn(*s, HEAD_DIM, device="cuda", dtype=torch.bfloat16, generator=make) for s in shapes]


def padding_of(mask: str, length: int) -> torch.Tensor:
    padding = torch.ones(1, length, dtype=torch.bool, device="cuda")
    if mask == "left":
        padding[:, : length // 4] = False
    return padding


def our_call(mask: str, length: int):
    import sympy
    from plans import CAUSAL, Call, b, k, load, s

    from effattn.ir.attention import AttentionSpec, CaptureSpec
    from effattn.ir.expr import q
    from effattn.ir.plan import Plan
    from effattn.ir.site import Layout, called_site
    from effattn.lowering.forms.power import POWER
    from effattn.lowering.forms.window import WINDOW as WINDOW_FORM

    score = HEAD_DIM**-0.5 * s
    if mask == "causal":
        return Call(Plan("exact", AttentionSpec(score, CAUSAL, empty_rows="never")))
    if mask in ("padding", "left"):
        seen = sympy.And(CAUSAL, sympy.Ne(load("padding", [b, k], integer=True), 0))
        plan = Plan("exact", AttentionSpec(score, seen, captures=(CaptureSpec("padding", "bool", 2),)))
        return Call(plan, captures=[padding_of(mask, length)])
    plain = AttentionSpec(score, CAUSAL, empty_rows="never")
    site = called_site(plain, q, Layout(1, HEADS, KV_HEADS, length, length, HEAD_DIM, HEAD_DIM))
    if mask == "power":
        params = POWER.params(block=BLOCK, window=WINDOW, sinks=SINKS)
        return Call(Plan("power", replace(plain, keep=POWER.keep(params, site))))
    params = WINDOW_FORM.params(window=WINDOW, sinks=SINKS)
    return Call(Plan("window", replace(plain, keep=WINDOW_FORM.keep(params, site))))


def blocks(mask: str, length: int):
    """(block has a kept pair, block keeps every pair), both [blocks, blocks], from formulas."""
    n = length // BLOCK
    i, j = torch.arange(n, device="cuda")[:, None], torch.arange(n, device="cuda")[None, :]
    distance, wide = i - j, WINDOW // BLOCK
    if mask == "power":
        kept = (distance < wide) | (distance & (distance - 1) == 0) | (j * BLOCK < SINKS)
        return kept & (j <= i), kept & (j < i)
    if mask == "window":
        sink = j * BLOCK < SINKS
        return ((distance <= wide) | sink) & (j <= i), ((distance < wide) | sink) & (j < i)
    return j <= i, j < i


def flex_call(mask: str, length: int):
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    torch._dynamo.reset()  # or the lengths and masks so far count towards its limit of recompilations
    padding = padding_of(mask, length)

    def keep(b, h, q, k):
        if mask in ("padding", "left"):
            return (k <= q) & padding[b, k]
        if mask == "power":
            distance = q // BLOCK - k // BLOCK
            power = (distance & (distance - 1)) == 0
            return (k <= q) & ((distance < WINDOW // BLOCK) | power | (k < SINKS))
        return (k <= q) & ((q - k < WINDOW) | (k < SINKS)) if mask == "window" else k <= q

    def ordered(some):
        order = some.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return some.sum(-1).to(torch.int32)[None, None], order.to(torch.int32)[None, None]

    some, full = blocks(mask, length)
    block_mask = BlockMask.from_kv_blocks(*ordered(some & ~full), *ordered(full), BLOCK_SIZE=BLOCK, mask_mod=keep)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=True)


def sdpa_call(backend: str, q, k, v, causal=True):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if backend == "flash" else SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def variants(mask: str, length: int, quick: bool = False):
    """Name -> function that makes what is to be timed."""

    def ours(config):
        def make():
            from effattn.runtime.targets import triton as triton_target

            call, (q, k, v) = our_call(mask, length), inputs(length)
            return lambda: triton_target.run(call.plan, q, k, v, call.captures, config=config)

        return make

    def flex():
        call, (q, k, v) = flex_call(mask, length), inputs(length)
        return lambda: call(q, k, v)

    def sdpa(backend):
        def make():
            q, k, v = inputs(length)
            k, v = (tensor.repeat_interleave(HEADS // KV_HEADS, 1) for tensor in (k, v))
            return lambda: sdpa_call(backend, q, k, v)

        return make

    def op():
        import effattn.runtime.ops.attend  # noqa: F401  (registers the op)

        call, (q, k, v) = our_call(mask, length), inputs(length)
        plan = call.plan.encode()
        return lambda: torch.ops.effattn.attend(q, k, v, call.captures, [], [], plan)

    tiles = quick_configs(mask) if quick else configs()
    found = {f"ours {name}": ours(config) for name, config in tiles.items()}
    if mask != "left":
        found["flex"] = flex
    if mask == "causal":
        found |= {"the op": op, "flash": sdpa("flash"), "cudnn": sdpa("cudnn")}
    return found


def decode_variants(batch: int, length: int, live: int):
    from effattn.lowering.kernels.spec import Tiles

    def ours(config, splits):
        def make():
            from plans import CASES, Sizes

            from effattn.runtime.targets import triton as triton_target

            call = CASES["cache_by_pointer"](Sizes(head_dim=HEAD_DIM), torch.device("cuda"))
            call.captures = [torch.tensor(live - 1, device="cuda")]
            q, k, v = inputs(length, batch, 1)
            return lambda: triton_target.run(call.plan, q, k, v, call.captures, config=config, splits=splits)

        return make

    def sdpa():
        q, k, v = inputs(length, batch, 1)
        k, v = k[:, :, :live], v[:, :, :live]
        attend = torch.nn.functional.scaled_dot_product_attention
        return lambda: attend(q, k, v, enable_gqa=True)

    found = {"ours default": ours(None, None), "sdpa of the live part": sdpa}
    found |= {f"ours 64 w4 s3 /{splits}": ours(Tiles(16, 64, 4, 3), splits) for splits in (1, 2, 3, 8) if batch > 1}
    for block_n, warps, stages in ((64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 3)):
        for splits in (16, 32, 64):
            found[f"ours {block_n} w{warps} s{stages} /{splits}"] = ours(Tiles(16, block_n, warps, stages), splits)
    return found


BACKWARD = (("causal", 8192), ("causal", 32768), ("padding", 32768), ("window", 32768))


def backward_variants(mask: str, length: int):
    """The backward alone: gradients of all three inputs."""
    from effattn.lowering.kernels.spec import Tiles

    def ours(config):
        def make():
            from effattn.runtime.targets import triton as triton_target

            call, (q, k, v) = our_call(mask, length), inputs(length)
            out, lse = triton_target.run(call.plan, q, k, v, call.captures)
            grad = torch.randn_like(out)
            return lambda: triton_target.run_backward(
                call.plan, grad, None, q, k, v, out, lse, call.captures, config=config
            )

        return make

    def through_autograd(forward):
        def make():
            q, k, v = (tensor.requires_grad_() for tensor in inputs(length))
            out = forward(q, k, v)
            grad = torch.randn_like(out)
            return lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

        return make

    def sdpa(backend):
        def forward(q, k, v):
            k, v = (tensor.repeat_interleave(HEADS // KV_HEADS, 1) for tensor in (k, v))
            return sdpa_call(backend, q, k, v)

        return through_autograd(forward)

    found = {"ours default": ours(None), "flex": through_autograd(lambda q, k, v: flex_call(mask, length)(q, k, v))}
    tiles = ((128, 64, 8, 2), (128, 64, 8, 1), (128, 32, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 64, 8, 3))
    found |= {f"ours {m}x{n} w{warps} s{stages}": ours(Tiles(m, n, warps, stages)) for m, n, warps, stages in tiles}
    if mask == "causal":
        found |= {"flash": sdpa("flash"), "cudnn": sdpa("cudnn")}
    return found


def timed(run, budget: float = 0.25) -> float:
    """Median milliseconds after warm-up."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    once = max(time.perf_counter() - start, 1e-5)
    times = []
    for _ in range(max(3, min(50, int(budget / once)))):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in times)


def graphed(run):
    """``run`` as a CUDA graph: the time of the device alone."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def check_cuda_graph() -> dict:
    """A captured decode step follows the cache length, which lives on the device."""
    from plans import CASES, Sizes, tensors

    from effattn.runtime.reference.attention import reference
    from effattn.runtime.targets import triton as triton_target

    sizes = Sizes(2, 8, 2, 1, 3000, 64, 64)
    call = CASES["cache_by_pointer"](sizes, torch.device("cuda"))
    query, key, value = tensors(sizes, "cuda", torch.float16)
    held = []
    replay = graphed(lambda: held.append(triton_target.run(call.plan, query, key, value, call.captures)))
    worst = 0.0
    for live in (5, 700, 2999):
        call.captures[0].fill_(live)
        replay()
        wanted, _ = reference(call.plan, query, key, value, call.captures)
        worst = max(worst, (held[-1][0].double() - wanted).abs().max().item())
    return {"job": ["a decode step in a CUDA graph"], "out": worst, "lse": 0.0, "good": worst < 4e-3}


def host_cost() -> dict[str, float]:
    """Microseconds of Python that one small call takes: of the target alone, with padding too, and through the op."""
    import effattn.runtime.ops.attend  # noqa: F401  (registers the op)
    from effattn.runtime.targets import triton as triton_target

    found = {}
    for mask in ("causal", "padding", "window"):
        call, (q, k, v) = our_call(mask, 256), inputs(256)
        plan = call.plan.encode()
        runs = {
            mask: lambda: triton_target.run(call.plan, q, k, v, call.captures, kind="prefill"),  # noqa: B023
            f"op, {mask}": lambda: torch.ops.effattn.attend(q, k, v, call.captures, [], [], plan),  # noqa: B023
        }
        for name, run in runs.items():
            for _ in range(10):
                run()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(200):
                run()
            found[name] = (time.perf_counter() - start) / 200 * 1e6
            torch.cuda.synchronize()
    return found


# --- the run -----------------------------------------------------------------------------------------------------


def work(job):
    """One job of the pool; never raises."""
    kind, *rest = job
    try:
        if kind == "check":
            return check_one(rest[0])
        if kind == "warm":
            mask, length, name, quick = rest
            variants(mask, length, quick)[name]()()
        if kind == "warm decode":
            sizes, name = rest
            decode_variants(*sizes)[name]()()
        if kind == "warm backward":
            (mask, length), name = rest
            backward_variants(mask, length)[name]()()
        torch.cuda.synchronize()
        return None
    except Exception as error:
        return {"job": job, "good": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        torch.cuda.empty_cache()


DECODE = ((1, 32768, 32768), (1, 131072, 131072), (16, 32768, 32768), (1, 131072, 800))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="kernels_check.json")
    parser.add_argument("--part", default="check,time,decode,backward")
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--seconds", type=float, help="stop starting new measurements after this")
    parser.add_argument("--quick", action="store_true", help="the defaults and their nearest rivals")
    args = parser.parse_args()
    args.seconds = args.seconds or (QUICK_SECONDS if args.quick else 330)
    if args.quick:
        args.part = "time,decode,backward,host"
    masks, lengths = (QUICK_MASKS, QUICK_LENGTHS) if args.quick else (MASKS, LENGTHS)
    begun = time.perf_counter()
    parts = args.part.split(",")
    found: dict = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "checks": [],
        "times": [],
        "decode": [],
        "backward": [],
    }

    jobs: list[tuple] = []
    if "check" in parts:
        jobs += [("check", job) for job in check_jobs()]
    if "time" in parts:
        jobs += [("warm", mask, length, "flex", False) for mask in MASKS for length in lengths]
        for mask in masks:
            named = quick_configs(mask) if args.quick else configs()
            jobs += [("warm", mask, LENGTHS[0], f"ours {name}", args.quick) for name in named]
    if "decode" in parts:
        names = ["ours default"] if args.quick else decode_variants(*DECODE[0])
        jobs += [("warm decode", DECODE[0], name) for name in names if "/16" in name or "def" in name]
    if "backward" in parts and args.quick:
        jobs += [("warm backward", sizes, "ours default") for sizes in BACKWARD[1:3]]
    elif "backward" in parts:
        jobs += [("warm backward", BACKWARD[0], name) for name in backward_variants(*BACKWARD[0])]
        jobs += [("warm backward", sizes, "flex") for sizes in BACKWARD[1:]]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        for result in pool.map(work, jobs):
            if result and not result["good"]:
                print("WRONG" if "error" not in result else "FAILED", result, flush=True)
            if result:
                found["checks"].append(result)
    print(f"compiled and checked in {time.perf_counter() - begun:.0f} s", flush=True)
    if "check" in parts:
        found["checks"].append(check_cuda_graph())
    if {"check", "host"} & set(parts):
        found["host_microseconds"] = host_cost()

    def save():
        Path(args.out).write_text(json.dumps(found, indent=1))

    def measure(make, graph=False):
        try:
            run = make()
            return timed(graphed(run) if graph else run)
        except Exception:
            print(traceback.format_exc(limit=1)[-400:], flush=True)
            return None
        finally:
            torch.cuda.empty_cache()

    save()
    for length in lengths if "time" in parts else ():
        for mask in masks:
            some, _ = blocks(mask, length)
            whole = length * 3 // 4 if mask == "left" else length  # keys that are seen, and rows that see any
            sparse = mask in ("power", "window")
            pairs = some.sum().item() * BLOCK**2 if sparse else whole * (whole + 1) / 2
            for name, make in variants(mask, length, args.quick).items():
                if time.perf_counter() - begun > args.seconds:
                    print("out of time before", mask, length, name)
                    continue
                spent = measure(make)
                rate = None if spent is None else 4 * HEAD_DIM * HEADS * pairs / spent / 1e9
                found["times"].append({"mask": mask, "length": length, "name": name, "ms": spent, "tflops": rate})
        save()
    quick_decode = ("ours default", "sdpa of the live part", *(f"ours 64 w4 s3 /{n}" for n in (1, 2, 3, 8, 16)))
    for sizes in DECODE if "decode" in parts else ():
        for name, make in decode_variants(*sizes).items():
            if args.quick and name not in quick_decode:
                continue
            if time.perf_counter() - begun < args.seconds:
                found["decode"].append({"sizes": sizes, "name": name, "ms": measure(make, graph=True)})
    backward = BACKWARD[1:3] if args.quick else BACKWARD
    for sizes in backward if "backward" in parts else ():
        for name, make in backward_variants(*sizes).items():
            if args.quick and name not in ("ours default", "flash", "cudnn"):
                continue
            if time.perf_counter() - begun < args.seconds:
                found["backward"].append({"sizes": sizes, "name": name, "ms": measure(make)})
    save()
    table(found)
    print(f"{time.perf_counter() - begun:.0f} s")


def table(found: dict) -> None:
    good = sum(check["good"] for check in found["checks"])
    print(f"\n{found['device']}, torch {found['torch']}: {good} of {len(found['checks'])} checks right", end="")
    print()
    if "host_microseconds" in found:
        costs = (f"{name} {cost:.0f} us" for name, cost in found["host_microseconds"].items())
        print(f"host time of a call: {', '.join(costs)}\n")
    columns = list(dict.fromkeys((row["mask"], row["length"]) for row in found["times"]))
    columns.sort(key=lambda column: (QUICK_MASKS.index(column[0]), column[1]))
    times = {(row["name"], row["mask"], row["length"]): row for row in found["times"]}
    names = list(dict.fromkeys(row["name"] for row in found["times"]))
    if names:
        print("ms (TFLOP/s)".ljust(26) + "".join(f"{mask[:7]} {length // 1024}K".rjust(14) for mask, length in columns))
    for name in names:
        cells = []
        for column in columns:
            row = times.get((name, *column))
            empty = row is None or row["ms"] is None
            cells.append("-" if empty else f"{row['ms']:.2f} ({row['tflops']:.0f})")
        print(name.ljust(26) + "".join(cell.rjust(14) for cell in cells))
    for sizes in DECODE:
        rows = [row for row in found["decode"] if tuple(row["sizes"]) == sizes and row["ms"]]
        if rows:
            print(f"\ndecode B {sizes[0]}, {sizes[1]} slots, {sizes[2]} live: ", end="")
            print(", ".join(f"{row['name']} {row['ms'] * 1000:.0f} us" for row in rows))
    for sizes in BACKWARD:
        rows = [row for row in found["backward"] if tuple(row["sizes"]) == sizes and row["ms"]]
        if rows:
            print(f"\nbackward, {sizes[0]} {sizes[1]}: ", end="")
            print(", ".join(f"{row['name']} {row['ms']:.2f} ms" for row in rows))


if __name__ == "__main__":
    main()
