"""What happened to every attention: the data, and its views as text and HTML."""
