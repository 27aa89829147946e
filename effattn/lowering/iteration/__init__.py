"""Which key tiles a tile of queries visits, and which of them need no test."""
