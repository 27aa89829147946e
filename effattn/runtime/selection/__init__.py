"""Selectors: choosing keys when the op runs."""
