"""Chooses one form per site, with the reason."""
