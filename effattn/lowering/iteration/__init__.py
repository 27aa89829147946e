"""Which key tiles a query tile visits, and which of them need no mask."""
