"""What a policy costs, measured: errors by layer, kept mass, perplexity, passkeys, time."""
