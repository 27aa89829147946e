"""From a draft to the finished site: what its scores mean, and whether an op can compute it."""
