"""Presentation of results: tables, a picture, progress."""
