"""Splits scores into score and predicate, and finds what queries without keys give."""
