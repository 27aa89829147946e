"""Choosing keys when the op runs."""
