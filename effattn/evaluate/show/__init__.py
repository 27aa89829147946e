"""Results for people: tables, a picture, progress."""
