"""Replaces sites by ops; each is replaced as a whole or not at all."""
