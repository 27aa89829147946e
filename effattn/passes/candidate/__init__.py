"""Facts about an attention while it is being matched, and the reasons for leaving one alone."""
