"""One form for each site, with the reason."""
