"""Before matching: brings different spellings to one form, and restores those that no site used."""
