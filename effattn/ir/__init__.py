"""The records that every stage shares: expressions, sites, plans.

Nothing here imports another stage of effattn. ``expr`` holds the vocabulary of score expressions and
predicates, ``fold`` walks them, ``wire`` turns them into JSON and back without evaluating anything,
``text`` prints them for people; ``site`` is what matching yields, ``plan`` is what an op carries.
"""
