"""Policies: which forms are allowed where, read from TOML and checked before anything is compiled.

``policy`` and ``rules`` have the records, ``shipped`` the policies that come with effattn. ``fields`` checks single
values, ``layers`` parses layer ranges, ``problems`` turns mistakes into messages, ``locate`` finds the line of a key,
``write`` prints a policy as TOML.
"""

from effattn.policy.policy import Match, Policy
from effattn.policy.rules import Rule

__all__ = ["Match", "Policy", "Rule"]
