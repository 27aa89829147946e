"""Code that only looks like attention, or is attention beside something that must not be lost.

``refusal`` is the rule that the report has to name, "" any; None: it is found, ``sites`` times, and exact.
``sites`` 0 without a refusal: nothing is found, and there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from effattn.ir.refusal import Why

INF = float("inf")


@dataclass(frozen=True)
class Hostile:
    """``run(q, k, v, given)`` with tensors [B, H, N, D] of as many heads."""

    run: Callable
    refusal: str | None = None
    sites: int = 1
    data: tuple[str, ...] = ()
    square: bool = False
    equal_widths: bool = False
    no_gradient: bool = False
    found_or_refused: bool = False  # both are right, as long as the result is


def scores(q, k):
    return q @ k.mT * 0.3


def causal(s):
    return torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()


def positions(x):
    return torch.arange(x.shape[2], device=x.device)


def distance(q, k):
    return positions(q)[:, None] - positions(k)


def mixed_heads(q):
    return torch.ones(q.shape[1], q.shape[1], dtype=q.dtype, device=q.device).tril()


def weights_returned(q, k, v, given):
    w = scores(q, k).softmax(-1)
    return w @ v, w


def weights_averaged(q, k, v, given):
    w = F.softmax(scores(q, k), -1)
    return w @ v, w.mean(1)


def scores_returned(q, k, v, given):
    s = scores(q, k)
    return s.softmax(-1) @ v, s


def logarithm_returned(q, k, v, given):
    s = scores(q, k).masked_fill(~causal(q @ k.mT), -INF)
    return s.softmax(-1) @ v, torch.logsumexp(s, dim=-1)


def weights_multiplied(q, k, v, given):
    return (scores(q, k).softmax(-1) * given["pair bias"]) @ v


def weights_divided(q, k, v, given):
    return (scores(q, k).softmax(-1) / (1 + given["pair bias"].abs())) @ v


def weights_added(q, k, v, given):
    return (scores(q, k).softmax(-1) + causal(q @ k.mT)) @ v


def weights_subtracted(q, k, v, given):
    return (scores(q, k).softmax(-1) - 0.4 * scores(q, k.flip(2)).softmax(-1)) @ v


def weights_subtracted_twice(q, k, v, given):
    first = scores(q, k).softmax(-1)
    return (first - 0.4 * scores(q, k.flip(2)).softmax(-1)) @ v + first @ v


def padded_by_one(q, k, v, given):
    return F.pad(scores(q, k), (0, 1)).softmax(-1)[..., :-1] @ v


def checkpointed(q, k, v, given):
    def attention(q, k, v, hidden):
        return scores(q, k).masked_fill(hidden, -INF).softmax(-1) @ v

    return checkpoint(attention, q, k, v, ~causal(q @ k.mT), use_reentrant=False)


def weights_renormalised(q, k, v, given):
    w = scores(q, k).softmax(-1) * causal(q @ k.mT)
    return w / (w.sum(-1, keepdim=True) + 1e-6) @ v


def weights_masked(q, k, v, given):
    return torch.where(causal(q @ k.mT), scores(q, k).softmax(-1), 0.0) @ v


def weights_masked_as_scores(q, k, v, given):
    hidden = ~causal(q @ k.mT)
    return scores(q, k).masked_fill(hidden, -INF).softmax(-1).masked_fill(hidden, 0.0) @ v


def weights_masked_otherwise(q, k, v, given):
    hidden = ~causal(q @ k.mT)
    return scores(q, k).masked_fill(hidden, -INF).softmax(-1).masked_fill(hidden | hidden.flip(-1), 0.0) @ v


def weights_without_nan(q, k, v, given):
    s = scores(q, k).masked_fill(~given["pairs"], -INF)
    return torch.nan_to_num(s.softmax(-1)) @ v


def softmax_over_queries(q, k, v, given):
    return scores(q, k).softmax(-2) @ v


def softmax_over_heads(q, k, v, given):
    return scores(q, k).softmax(1) @ v


def softmax_twice(q, k, v, given):
    return scores(q, k).softmax(-1).softmax(-1) @ v


def log_softmax(q, k, v, given):
    return F.log_softmax(scores(q, k), -1).exp() @ v


def sigmoid(q, k, v, given):
    return torch.sigmoid(scores(q, k)) @ v


def rectified(q, k, v, given):
    return F.relu(scores(q, k)) @ v


def second_product(q, k, v, given):
    return (scores(q, k) + q.flip(-1) @ k.mT).softmax(-1) @ v


def shaw(q, k, v, given):
    """Relative positions that meet the query: a second product, of data."""
    place = distance(q, k).clamp(-7, 7) + 7
    table = given["relative"].repeat(1, q.shape[-1])[:, : q.shape[-1]]
    return (scores(q, k) + torch.einsum("bhid,ijd->bhij", q, table[place])).softmax(-1) @ v


def talking_heads(q, k, v, given):
    mixed = torch.einsum("bhij,hg->bgij", scores(q, k), mixed_heads(q))
    return mixed.softmax(-1) @ v


def talking_weights(q, k, v, given):
    w = scores(q, k).softmax(-1)
    return torch.einsum("bhij,hg->bgij", w, mixed_heads(q)) @ v


def best_scores(q, k, v, given):
    s = scores(q, k)
    least = s.topk(min(2, s.shape[-1]), dim=-1).values[..., -1:]
    return s.masked_fill(s < least, -INF).softmax(-1) @ v


def scores_above_zero(q, k, v, given):
    s = scores(q, k)
    return torch.where(s > 0, s, -1e9).softmax(-1) @ v


def triangle_of_scores(q, k, v, given):
    """Later keys keep a score of 0: they are not hidden."""
    return scores(q, k).tril().softmax(-1) @ v


def scores_set(q, k, v, given):
    s = scores(q, k)
    s[..., -1] = 0.5
    return s.softmax(-1) @ v


def scores_of_pieces(q, k, v, given):
    half = k.shape[2] // 2
    s = torch.cat([scores(q, k[:, :, :half]), scores(q, k[:, :, half:])], dim=-1)
    return s.softmax(-1) @ v


def values_of_pieces(q, k, v, given):
    w = scores(q, k).softmax(-1)
    half = k.shape[2] // 2
    return w[..., :half] @ v[:, :, :half] + w[..., half:] @ v[:, :, half:]


def products_by_hand(q, k, v, given):
    s = (q[:, :, :, None] * k[:, :, None]).sum(-1)
    return s.softmax(-1) @ v


def value_written_between(q, k, v, given):
    v = v.clone()
    w = scores(q, k).softmax(-1)
    v.mul_(2)
    return w @ v


def key_written_between(q, k, v, given):
    k = k.clone()
    w = scores(q, k).softmax(-1)
    k.zero_()
    return w @ v, k


def query_written_after(q, k, v, given):
    q = q.clone()
    out = scores(q, k).softmax(-1) @ v
    q.add_(1)
    return out, q


def scores_written_after(q, k, v, given):
    s = scores(q, k)
    out = s.softmax(-1) @ v
    s.zero_()
    return out, s


def mask_written_between(q, k, v, given):
    seen = given["pairs"].clone()
    first = scores(q, k).masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1) @ v
    seen[..., 0] = False
    seen[..., -1] = True
    return first, scores(q, k).masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1) @ v


def padding_written_between(q, k, v, given):
    seen = given["padding"].clone()
    first = scores(q, k).masked_fill(~seen[:, None, None], -INF).softmax(-1) @ v
    seen.logical_not_()
    seen[:, 0] = True
    return first, scores(q, k).masked_fill(~seen[:, None, None], -INF).softmax(-1) @ v


def counter_raised_between(q, k, v, given):
    past, j = given["past"].clone(), positions(k)
    i = positions(q)[:, None]
    first = scores(q, k).masked_fill(j > i + past, -INF).softmax(-1) @ v
    past += 2
    return first, scores(q, k).masked_fill(j > i + past, -INF).softmax(-1) @ v, past


def two_layers(q, k, v, given):
    x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return (scores(x, k).masked_fill(~causal(q @ k.mT), -INF)).softmax(-1) @ v


def one_tensor(q, k, v, given):
    return (q @ q.mT).softmax(-1) @ q


def key_is_value(q, k, v, given):
    return scores(q, k).softmax(-1) @ k


def key_of_another_batch(q, k, v, given):
    return scores(q, k.flip(0)).softmax(-1) @ v.roll(1, 0)


def every_other_key(q, k, v, given):
    i, j = positions(q)[:, None], positions(k)
    seen = (j <= i)[:, ::2]
    return scores(q, k[:, :, ::2]).masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1) @ v[:, :, ::2]


def appended_keys(q, k, v, given):
    k, v = torch.cat([k, k * 0.5], dim=2), torch.cat([v, v + 1], dim=2)
    i, j = positions(q)[:, None], positions(k)
    return scores(q, k).masked_fill(j > i + k.shape[2] // 2, -INF).softmax(-1) @ v


def cache_written(q, k, v, given):
    keys, values = torch.zeros_like(k).repeat(1, 1, 2, 1), torch.zeros_like(v).repeat(1, 1, 2, 1)
    keys[:, :, : k.shape[2]] = k
    values[:, :, : v.shape[2]] = v
    seen = positions(keys) < k.shape[2]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[None].expand(q.shape[2], -1)), keys


def live_dropout(q, k, v, given):
    torch.manual_seed(0)
    return F.dropout(scores(q, k).softmax(-1), 0.5) @ v


def multiplied_mask(q, k, v, given):
    """Hidden keys have a score of 0, which is a weight like others."""
    return (scores(q, k) * causal(q @ k.mT)).softmax(-1) @ v


def infinite_bias(q, k, v, given):
    """A key that all rows hide, in some sequences all of them, by data that is added."""
    return (scores(q, k) + given["infinite bias"]).softmax(-1) @ v


def negative_index(q, k, v, given):
    """An index below zero counts from the end."""
    place = distance(q, k).clamp(-7, 7)
    return (scores(q, k) + given["relative"][place].permute(2, 0, 1)).softmax(-1) @ v


def detached(q, k, v, given):
    return scores(q, k).detach().softmax(-1) @ v


def result_changed(q, k, v, given):
    out = scores(q, k).softmax(-1) @ v
    out += 1
    out[..., 0] = 0
    return out


def expanded_query(q, k, v, given):
    """One query of all sequences, as in a Perceiver."""
    latent = given["latent"][None].expand(q.shape[0], -1, -1, -1)
    return scores(latent, k).softmax(-1) @ v


def one_key_of_all(q, k, v, given):
    return scores(q, k[:1]).softmax(-1) @ v[:1]


def keys_in_rows(q, k, v, given):
    """Scores [keys, queries] from beginning to end."""
    s = k @ q.mT * 0.3
    return (v.mT @ s.masked_fill(~causal(s.mT).mT, -INF).softmax(-2)).mT


def value_scaled(q, k, v, given):
    return scores(q, k).softmax(-1) @ (v * 2.0 / 3)


def value_of_one_row(q, k, v, given):
    return scores(q, k).softmax(-1) @ v[:, :, :1].expand(-1, -1, k.shape[2], -1)


def under_autocast(q, k, v, given):
    with torch.autocast(q.device.type, torch.bfloat16):
        return scores(q, k).masked_fill(~causal(q @ k.mT), -INF).softmax(-1) @ v


def query_raised_by_the_result(q, k, v, given):
    q = q.clone()
    out = scores(q, k).softmax(-1) @ v
    q += out
    return q


def given_lowest(q, k, v, given):
    return (scores(q, k) + given["low pairs"]).softmax(-1) @ v


def given_lowest_in_sdpa(q, k, v, given):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=given["low pairs"])


def standardised(q, k, v, given):
    s = scores(q, k)
    return ((s - s.mean(-1, keepdim=True)) / (s.std() + 1)).softmax(-1) @ v


def weights_doubled(q, k, v, given):
    return (scores(q, k).softmax(-1) * 2.0) @ v


def divided_at_the_end(q, k, v, given):
    """The sum divides the result: no softmax stands there."""
    e = scores(q, k).exp()
    return (e @ v) / e.sum(-1, keepdim=True)


def other_sum(q, k, v, given):
    e = scores(q, k).exp()
    return e / e.sum(-2, keepdim=True) @ v


def sum_and_more(q, k, v, given):
    e = scores(q, k).exp()
    return e / (e.sum(-1, keepdim=True) + 1.0) @ v


def sum_of_others(q, k, v, given):
    """Divided by the sum over keys that the query may see, and not only those are weighed."""
    e = scores(q, k).exp()
    return e / (e * causal(q @ k.mT)).sum(-1, keepdim=True) @ v


def shifted_by_another(q, k, v, given):
    s = scores(q, k)
    e = (s - s.amax(-2, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True) @ v


def exponential_used_elsewhere(q, k, v, given):
    e = scores(q, k).exp()
    return e / e.sum(-1, keepdim=True) @ v, e


def exponential_written(q, k, v, given):
    e = scores(q, k).exp()
    total = e.sum(-1, keepdim=True)
    e.tril_()
    return e / total @ v


HOSTILE: dict[str, Hostile] = {
    "weights returned": Hostile(weights_returned, Why.WEIGHTS),
    "weights averaged": Hostile(weights_averaged, Why.WEIGHTS),
    "scores returned": Hostile(scores_returned),
    "logarithm returned": Hostile(logarithm_returned),
    "weights multiplied": Hostile(weights_multiplied, Why.WEIGHTS, data=("pair bias",)),
    "weights divided": Hostile(weights_divided, Why.WEIGHTS, data=("pair bias",)),
    "weights added": Hostile(weights_added, Why.WEIGHTS),
    "weights subtracted": Hostile(weights_subtracted, sites=2),
    "weights subtracted, and used": Hostile(weights_subtracted_twice, found_or_refused=True),
    "padded by one": Hostile(padded_by_one),
    "checkpointed": Hostile(checkpointed),
    "weights renormalised": Hostile(weights_renormalised, Why.WEIGHTS),
    "weights masked": Hostile(weights_masked, Why.WEIGHTS),
    "weights masked as scores": Hostile(weights_masked_as_scores),
    "weights masked otherwise": Hostile(weights_masked_otherwise, Why.WEIGHTS),
    "weights without NaN": Hostile(weights_without_nan, data=("pairs",)),
    "softmax over queries": Hostile(softmax_over_queries, Why.VALUE),
    "softmax over heads": Hostile(softmax_over_heads, Why.AXIS),
    "softmax twice": Hostile(softmax_twice, Why.NO_PRODUCT, sites=0),
    "log softmax": Hostile(log_softmax, sites=0, found_or_refused=True),
    "sigmoid": Hostile(sigmoid, Why.NO_SOFTMAX),
    "rectified": Hostile(rectified, Why.NO_SOFTMAX),
    "second product": Hostile(second_product, equal_widths=True),
    "relative positions of the query": Hostile(shaw, data=("relative",)),
    "talking heads": Hostile(talking_heads, ""),
    "talking weights": Hostile(talking_weights, ""),
    "best scores": Hostile(best_scores, found_or_refused=True),
    "scores above zero": Hostile(scores_above_zero, found_or_refused=True),
    "triangle of scores": Hostile(triangle_of_scores),
    "scores set": Hostile(scores_set),
    "scores of pieces": Hostile(scores_of_pieces, ""),
    "values of pieces": Hostile(values_of_pieces, Why.WEIGHTS),
    "products by hand": Hostile(products_by_hand, ""),
    "value written between": Hostile(value_written_between, found_or_refused=True),
    "key written between": Hostile(key_written_between, no_gradient=True),
    "query written after": Hostile(query_written_after, no_gradient=True),
    "scores written after": Hostile(scores_written_after),
    "mask written between": Hostile(mask_written_between, sites=2, data=("pairs",), no_gradient=True),
    "padding written between": Hostile(padding_written_between, sites=2, data=("padding",), no_gradient=True),
    "counter raised between": Hostile(counter_raised_between, sites=2, data=("past",)),
    "two layers": Hostile(two_layers, sites=2, equal_widths=True),
    "one tensor": Hostile(one_tensor),
    "key is value": Hostile(key_is_value),
    "key of another batch": Hostile(key_of_another_batch),
    "every other key": Hostile(every_other_key),
    "appended keys": Hostile(appended_keys),
    "cache written": Hostile(cache_written),
    "live dropout": Hostile(live_dropout, Why.DROPOUT),
    "multiplied mask": Hostile(multiplied_mask),
    "infinite bias": Hostile(infinite_bias, data=("infinite bias",), no_gradient=True),
    "negative index": Hostile(negative_index, data=("relative",)),
    "detached": Hostile(detached, found_or_refused=True),
    "result changed": Hostile(result_changed),
    "expanded query": Hostile(expanded_query, data=("latent",), found_or_refused=True),
    "keys in rows": Hostile(keys_in_rows),
    "value scaled": Hostile(value_scaled),
    "value of one row": Hostile(value_of_one_row, found_or_refused=True),
    "under autocast": Hostile(under_autocast, found_or_refused=True, no_gradient=True),
    "query raised by the result": Hostile(query_raised_by_the_result, equal_widths=True, no_gradient=True),
    "given lowest": Hostile(given_lowest, data=("low pairs",), no_gradient=True, found_or_refused=True),
    "given lowest in SDPA": Hostile(given_lowest_in_sdpa, data=("low pairs",), no_gradient=True, found_or_refused=True),
    "standardised": Hostile(standardised, found_or_refused=True),
    "weights doubled": Hostile(weights_doubled, found_or_refused=True),
    "divided at the end": Hostile(divided_at_the_end, sites=0, found_or_refused=True),
    "other sum": Hostile(other_sum, Why.VALUE),
    "sum and more": Hostile(sum_and_more, sites=0, found_or_refused=True),
    "sum of others": Hostile(sum_of_others, sites=0, found_or_refused=True),
    "shifted by another": Hostile(shifted_by_another, found_or_refused=True),
    "exponential used elsewhere": Hostile(exponential_used_elsewhere),
    "exponential written": Hostile(exponential_written, sites=0, found_or_refused=True, no_gradient=True),
    "one key of all": Hostile(one_key_of_all, found_or_refused=True),
}
