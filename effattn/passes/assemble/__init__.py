"""From a candidate to the finished site: what its scores mean, and what keeps it from being one."""
