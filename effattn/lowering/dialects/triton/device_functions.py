"""Small device functions, copied into generated files that call them. Callers come before their callees."""

from __future__ import annotations

DEVICE_FUNCTIONS: dict[str, str] = {
    "_kept_tile": '''
@triton.jit
def _kept_tile(
    seed, first_row, first_key, pair,
    LEAST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, KEYS_FIRST: tl.constexpr,
):
    """Which weights of a tile dropout keeps; :func:`_kept` for all of it, with little of the work.

    A call of Philox serves queries q and q + 8 and keys k, k + 8, k + 16 and k + 24. The last two of these are in other
    threads where keys are the rows of a tile, or in other tiles: half of the words is not used there.
    ``first_row`` and ``first_key`` are multiples of 16.
    """
    rows = first_row // 2 + tl.arange(0, QUERIES // 2)
    if KEYS_FIRST or KEYS < 32:
        keys = first_key // 2 + tl.arange(0, KEYS // 2)
        high = keys & 8
        keys = keys // 16 * 8 + keys % 8
        if KEYS_FIRST:
            a, c, b, d = tl.philox(seed, rows[None, :], keys[:, None], pair, 0, 7)
            high = high[:, None]
        else:
            a, b, c, d = tl.philox(seed, rows[:, None], keys[None, :], pair, 0, 7)
            high = high[None, :]
        ab = tl.join(_enough(a, high, LEAST), _enough(b, high, LEAST))
        cd = tl.join(_enough(c, high, LEAST), _enough(d, high, LEAST))
        FIRST: tl.constexpr = KEYS if KEYS_FIRST else QUERIES
        SECOND: tl.constexpr = QUERIES if KEYS_FIRST else KEYS
        kept = tl.reshape(tl.join(ab, cd), [FIRST // 16, 8, SECOND // 16, 8, 2, 2])
        return tl.reshape(tl.permute(kept, (0, 5, 1, 2, 4, 3)), [FIRST, SECOND])
    else:
        keys = first_key // 4 + tl.arange(0, KEYS // 4)
        a, b, c, d = tl.philox(seed, rows[:, None], keys[None, :], pair, 0, 7)
        ab = tl.join(_both_enough(a, LEAST), _both_enough(b, LEAST))
        cd = tl.join(_both_enough(c, LEAST), _both_enough(d, LEAST))
        kept = tl.reshape(tl.join(ab, cd), [QUERIES // 16, 8, KEYS // 32, 8, 2, 2, 2])
        return tl.reshape(tl.permute(kept, (0, 6, 1, 2, 4, 5, 3)), [QUERIES, KEYS])
''',
    "_both_enough": """
@triton.jit
def _both_enough(word, LEAST: tl.constexpr):
    return tl.join(_enough(word, 0, LEAST), _enough(word, 1, LEAST))
""",
    "_kept": '''
@triton.jit
def _kept(seed, rows, keys, pair, LEAST: tl.constexpr):
    """Which weights dropout keeps."""
    a, b, c, d = tl.philox(seed, rows // 16 * 8 + rows % 8, keys // 32 * 8 + keys % 8, pair, 0, 7)
    word = tl.where((rows & 8) == 0, tl.where((keys & 8) == 0, a, b), tl.where((keys & 8) == 0, c, d))
    return _enough(word, keys & 16, LEAST)
''',
    "_enough": '''
@triton.jit
def _enough(word, high, LEAST: tl.constexpr):
    """Whether a half of a word, as a signed number, is at least that of ``LEAST``, whose low half is 0."""
    return tl.where(high != 0, word, word << 16).to(tl.int32, bitcast=True) >= LEAST
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
