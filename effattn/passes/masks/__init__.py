"""Score and predicate apart, and what rows without keys give."""
