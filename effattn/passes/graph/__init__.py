"""The graph as Dynamo made it: a read-only view, one vocabulary for all spellings, memory and writes."""
