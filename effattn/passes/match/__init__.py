"""From an anchor (a softmax or SDPA call) outwards to query, key, value and the result: a candidate."""
