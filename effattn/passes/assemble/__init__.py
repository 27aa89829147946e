"""From a candidate to a site: what its scores mean, and whether an op can compute it."""
