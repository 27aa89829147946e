"""Sites into ops; each whole or not at all."""
