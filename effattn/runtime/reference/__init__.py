"""Every op in a few lines of float64, to compare with."""
