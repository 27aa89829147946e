"""From an anchor, a softmax or an SDPA call, outward to query, key, value and the result: a candidate."""
