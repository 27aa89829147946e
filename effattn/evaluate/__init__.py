"""Measures what an approximation costs and saves on a model.

``evaluate`` measures errors by layer, perplexity, passkey retrieval and time. Its parts can be used alone: ``density``
counts the (query, key) pairs that a form keeps, without an N x N mask; ``perplexity`` measures a language model on long
text without an N x vocabulary tensor in float32; ``timed`` times calls on any device.
"""

from effattn.evaluate.evaluation import Evaluation
from effattn.evaluate.run import evaluate
from effattn.evaluate.tasks.clock import Timing, timed
from effattn.evaluate.tasks.density import density, density_of, kept_pairs
from effattn.evaluate.tasks.perplexity import Perplexity, perplexity

__all__ = [
    "Evaluation",
    "Perplexity",
    "Timing",
    "density",
    "density_of",
    "evaluate",
    "kept_pairs",
    "perplexity",
    "timed",
]
