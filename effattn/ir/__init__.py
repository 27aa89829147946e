"""The records that every stage shares.

This package imports no other stage of effattn. ``expr`` defines the terms of scores and predicates, ``fold`` evaluates
them in any algebra, ``wire`` converts them to and from JSON, ``text`` prints them. ``site`` is the result of matching;
``plan`` is the argument of an op.
"""
