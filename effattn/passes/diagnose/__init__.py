"""The true reason of a softmax that is left alone."""
