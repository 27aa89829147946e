"""What an attention is looked for from; a file for each kind of anchor."""
