"""Dynamo's graph: a read-only view, one vocabulary for all spellings, aliases and writes."""
