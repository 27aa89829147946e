"""References: every op in a few lines of float64."""
