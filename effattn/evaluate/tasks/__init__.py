"""What a policy costs: errors by layer, kept mass, perplexity, passkeys, time."""
