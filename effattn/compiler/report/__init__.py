"""The report on every attention: its data, and views of it as text and HTML."""
