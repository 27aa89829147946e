"""Small device functions, copied into generated files that call them. Callers come before their callees."""

from __future__ import annotations

DEVICE_FUNCTIONS: dict[str, str] = {
    "_kept_tile": '''
@triton.jit
def _kept_tile(
    seed, first_row, first_key, pair,
    LEAST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, KEYS_FIRST: tl.constexpr,
):
    """Which weights of a tile dropout keeps; :func:`_kept` for all of it, with a quarter of the work.

    Queries q and q + 8, keys k and k + 8 share a call. ``first_row`` and ``first_key`` are multiples of 16.
    """
    rows = first_row // 2 + tl.arange(0, QUERIES // 2)
    keys = first_key // 2 + tl.arange(0, KEYS // 2)
    if KEYS_FIRST:
        a, c, b, d = tl.philox(seed, rows[None, :], keys[:, None], pair, 0, 7)
        words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [KEYS // 16, 8, QUERIES // 16, 8, 2, 2])
    else:
        a, b, c, d = tl.philox(seed, rows[:, None], keys[None, :], pair, 0, 7)
        words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [QUERIES // 16, 8, KEYS // 16, 8, 2, 2])
    words = tl.permute(words, (0, 5, 1, 2, 4, 3)).to(tl.int32, bitcast=True)
    return tl.reshape(words, [KEYS, QUERIES] if KEYS_FIRST else [QUERIES, KEYS]) >= LEAST
''',
    "_kept": '''
@triton.jit
def _kept(seed, rows, keys, pair, LEAST: tl.constexpr):
    """Which weights dropout keeps: those whose word of Philox, as a signed number, is at least ``LEAST``."""
    a, b, c, d = tl.philox(seed, rows // 16 * 8 + rows % 8, keys // 16 * 8 + keys % 8, pair, 0, 7)
    word = tl.where((rows & 8) == 0, tl.where((keys & 8) == 0, a, b), tl.where((keys & 8) == 0, c, d))
    return word.to(tl.int32, bitcast=True) >= LEAST
''',
    "_listed_from": '''
@triton.jit
def _listed_from(tile, block, TILES: tl.constexpr):
    """How many listed tiles have a number >= tile. Listed are the blocks at distance 1, 2, 4, ... before ``block``."""
    whole = _powers_up_to(block - tl.cdiv(tile, TILES)) * TILES
    distance = block - tile // TILES
    cut = tile % TILES
    partial = (cut > 0) & (distance > 0) & ((distance & (distance - 1)) == 0)
    return whole + tl.where(partial, TILES - cut, 0)
''',
    "_listed_tile": '''
@triton.jit
def _listed_tile(place, block, TILES: tl.constexpr):
    """The number of the listed tile at ``place``, counted from the nearest tile backwards."""
    place = tl.maximum(place, 0)
    return (block - (1 << (place // TILES))) * TILES + (TILES - 1 - place % TILES)
''',
    "_powers_up_to": '''
@triton.jit
def _powers_up_to(distance):
    """How many of 1, 2, 4, 8, ... are <= distance."""
    left = tl.maximum(distance, 1)
    log = tl.where(left >= 65536, 16, 0)
    left = left >> log
    step = tl.where(left >= 256, 8, 0)
    left, log = left >> step, log + step
    step = tl.where(left >= 16, 4, 0)
    left, log = left >> step, log + step
    step = tl.where(left >= 4, 2, 0)
    left, log = left >> step, log + step
    log += tl.where(left >= 2, 1, 0)
    return tl.where(distance >= 1, log + 1, 0)
''',
    "_tanh": '''
@triton.jit
def _tanh(x):
    """From one exponential; the absolute error is that of single precision."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))
''',
    "_floor_div": '''
@triton.jit
def _floor_div(x, divisor):
    """Rounds down; ``//`` on the device rounds towards zero. The divisor is positive."""
    return tl.where((x < 0) & (x % divisor != 0), x // divisor - 1, x // divisor)
''',
    "_modulo": '''
@triton.jit
def _modulo(x, divisor):
    """Never negative. The divisor is positive."""
    rest = x % divisor
    return tl.where(rest < 0, rest + divisor, rest)
''',
    "_sign": """
@triton.jit
def _sign(x):
    return tl.where(x > 0, 1, 0) - tl.where(x < 0, 1, 0)
""",
    "_is_power_of_two": """
@triton.jit
def _is_power_of_two(x):
    return (x > 0) & ((x & (x - 1)) == 0)
""",
}
