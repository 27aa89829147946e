"""Code that only looks like attention, or is attention beside something that must not be lost.

``refusal`` is the rule that the report has to name, "" any; None: it is found, ``sites`` times, and exact.
``sites`` 0 without a refusal: nothing is found, and there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from effattn.ir.refusal import Why
from tests.fuzz.tables.hostile import by_hand, operands, products, weights, writes


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


HOSTILE: dict[str, Hostile] = {
    "weights returned": Hostile(weights.weights_returned, Why.WEIGHTS),
    "weights averaged": Hostile(weights.weights_averaged, Why.WEIGHTS),
    "scores returned": Hostile(weights.scores_returned),
    "logarithm returned": Hostile(weights.logarithm_returned),
    "weights multiplied": Hostile(weights.weights_multiplied, Why.WEIGHTS, data=("pair bias",)),
    "weights divided": Hostile(weights.weights_divided, Why.WEIGHTS, data=("pair bias",)),
    "weights added": Hostile(weights.weights_added, Why.WEIGHTS),
    "weights subtracted": Hostile(weights.weights_subtracted, sites=2),
    "weights subtracted, and used": Hostile(weights.weights_subtracted_twice, found_or_refused=True),
    "padded by one": Hostile(weights.padded_by_one),
    "checkpointed": Hostile(weights.checkpointed),
    "weights renormalised": Hostile(weights.weights_renormalised, Why.WEIGHTS),
    "weights masked": Hostile(weights.weights_masked, Why.WEIGHTS),
    "weights masked as scores": Hostile(weights.weights_masked_as_scores),
    "weights masked otherwise": Hostile(weights.weights_masked_otherwise, Why.WEIGHTS),
    "weights without NaN": Hostile(weights.weights_without_nan, data=("pairs",)),
    "softmax over queries": Hostile(weights.softmax_over_queries, Why.VALUE),
    "softmax over heads": Hostile(weights.softmax_over_heads, Why.AXIS),
    "softmax twice": Hostile(weights.softmax_twice, Why.NO_PRODUCT, sites=0),
    "log softmax": Hostile(weights.log_softmax, sites=0, found_or_refused=True),
    "sigmoid": Hostile(weights.sigmoid, Why.NO_SOFTMAX),
    "rectified": Hostile(weights.rectified, Why.NO_SOFTMAX),
    "second product": Hostile(products.second_product, equal_widths=True),
    "relative positions of the query": Hostile(products.shaw, data=("relative",)),
    "talking heads": Hostile(products.talking_heads, ""),
    "talking weights": Hostile(products.talking_weights, ""),
    "best scores": Hostile(products.best_scores, found_or_refused=True),
    "scores above zero": Hostile(products.scores_above_zero, found_or_refused=True),
    "triangle of scores": Hostile(products.triangle_of_scores),
    "scores set": Hostile(products.scores_set),
    "scores of pieces": Hostile(products.scores_of_pieces, ""),
    "values of pieces": Hostile(products.values_of_pieces, Why.WEIGHTS),
    "products by hand": Hostile(products.products_by_hand, ""),
    "value written between": Hostile(writes.value_written_between, found_or_refused=True),
    "key written between": Hostile(writes.key_written_between, no_gradient=True),
    "query written after": Hostile(writes.query_written_after, no_gradient=True),
    "scores written after": Hostile(writes.scores_written_after),
    "mask written between": Hostile(writes.mask_written_between, sites=2, data=("pairs",), no_gradient=True),
    "padding written between": Hostile(writes.padding_written_between, sites=2, data=("padding",), no_gradient=True),
    "counter raised between": Hostile(writes.counter_raised_between, sites=2, data=("past",)),
    "two layers": Hostile(operands.two_layers, sites=2, equal_widths=True),
    "one tensor": Hostile(operands.one_tensor),
    "key is value": Hostile(operands.key_is_value),
    "key of another batch": Hostile(operands.key_of_another_batch),
    "every other key": Hostile(operands.every_other_key),
    "appended keys": Hostile(operands.appended_keys),
    "cache written": Hostile(operands.cache_written),
    "live dropout": Hostile(operands.live_dropout, Why.DROPOUT),
    "multiplied mask": Hostile(operands.multiplied_mask),
    "infinite bias": Hostile(operands.infinite_bias, data=("infinite bias",), no_gradient=True),
    "negative index": Hostile(operands.negative_index, data=("relative",)),
    "detached": Hostile(operands.detached, found_or_refused=True),
    "result changed": Hostile(operands.result_changed),
    "expanded query": Hostile(operands.expanded_query, data=("latent",), found_or_refused=True),
    "keys in rows": Hostile(operands.keys_in_rows),
    "value scaled": Hostile(operands.value_scaled),
    "value of one row": Hostile(operands.value_of_one_row, found_or_refused=True),
    "under autocast": Hostile(operands.under_autocast, found_or_refused=True, no_gradient=True),
    "query raised by the result": Hostile(operands.query_raised_by_the_result, equal_widths=True, no_gradient=True),
    "given lowest": Hostile(by_hand.given_lowest, data=("low pairs",), no_gradient=True, found_or_refused=True),
    "given lowest in SDPA": Hostile(
        by_hand.given_lowest_in_sdpa, data=("low pairs",), no_gradient=True, found_or_refused=True
    ),
    "standardised": Hostile(by_hand.standardised, found_or_refused=True),
    "weights doubled": Hostile(by_hand.weights_doubled, found_or_refused=True),
    "divided at the end": Hostile(by_hand.divided_at_the_end, sites=0, found_or_refused=True),
    "other sum": Hostile(by_hand.other_sum, Why.VALUE),
    "sum and more": Hostile(by_hand.sum_and_more, sites=0, found_or_refused=True),
    "sum of others": Hostile(by_hand.sum_of_others, sites=0, found_or_refused=True),
    "shifted by another": Hostile(by_hand.shifted_by_another, found_or_refused=True),
    "exponential used elsewhere": Hostile(by_hand.exponential_used_elsewhere),
    "exponential written": Hostile(by_hand.exponential_written, sites=0, found_or_refused=True, no_gradient=True),
    "one key of all": Hostile(operands.one_key_of_all, found_or_refused=True),
}
