"""What is known of an attention while it is being put together, and why it may be left alone."""
