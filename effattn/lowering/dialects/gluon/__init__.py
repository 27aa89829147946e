"""Gluon, for Hopper: terms as source, device functions."""
