"""Policies: which forms are allowed where, read from TOML and checked before anything is compiled.

``policy`` and ``rules`` hold the records, ``shipped`` what comes with effattn, ``fields`` checks single values,
``layers`` reads layer ranges, ``problems`` turns every mistake into one clear message, ``locate`` finds the line of a
key, ``write`` prints a policy as TOML again.
"""

from effattn.policy.policy import Match, Policy
from effattn.policy.rules import Rule

__all__ = ["Match", "Policy", "Rule"]
