"""``python -m effattn`` is the command ``effattn``."""

from effattn.cli.main import app

app(prog_name="effattn")
