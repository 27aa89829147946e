"""What an approximation costs and what it saves: perplexity on real text, kept pairs, time.

``density`` counts the (query, key) pairs that a form keeps, without an N x N mask; ``perplexity`` measures a language
model on long text without an N x vocabulary tensor in float32; ``clock`` times calls on any device.
"""

from effattn.evaluate.clock import Timing, timed
from effattn.evaluate.density import density, density_of, kept_pairs
from effattn.evaluate.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "Timing", "density", "density_of", "kept_pairs", "perplexity", "timed"]
