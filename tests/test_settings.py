"""Environment variables, and what is told at which level."""

from __future__ import annotations

import logging
import pathlib

import pytest

from effattn import settings
from effattn.errors import OptionError


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for variable in settings.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setattr(settings, "_told", set())
    handlers = list(settings.logger.handlers)
    yield
    settings.logger.handlers[:] = handlers
    settings.logger.setLevel(logging.NOTSET)


def test_defaults():
    assert settings.current() == settings.Settings(debug=settings.Debug(), cache_dir=None, precise=False)


@pytest.mark.parametrize(("text", "precise"), [("1", True), ("0", False), ("", False)])
def test_precise(monkeypatch, text, precise):
    monkeypatch.setenv("EFFATTN_PRECISE", text)
    assert settings.current().precise is precise


def test_precise_is_a_switch(monkeypatch):
    monkeypatch.setenv("EFFATTN_PRECISE", "yes")
    with pytest.raises(OptionError, match="EFFATTN_PRECISE='yes' is not valid; allowed: 0 or 1"):
        settings.current()


@pytest.mark.parametrize(("text", "level"), [("0", 0), ("4", 4), (" 2 ", 2), ("", 0), ("  ", 0)])
def test_debug(monkeypatch, text, level):
    monkeypatch.setenv("EFFATTN_DEBUG", text)
    assert settings.current().debug == settings.Debug(level)


@pytest.mark.parametrize(("text", "level"), [("passes", 0), ("2,passes", 2), ("passes, 1", 1)])
def test_debug_of_passes(monkeypatch, text, level):
    monkeypatch.setenv("EFFATTN_DEBUG", text)
    assert settings.current().debug == settings.Debug(level, passes=True)


@pytest.mark.parametrize("text", ["5", "-1", "yes", "1.0", "0x1", "1,2", "passes,yes"])
def test_wrong_debug(monkeypatch, text):
    monkeypatch.setenv("EFFATTN_DEBUG", text)
    with pytest.raises(OptionError, match=r"EFFATTN_DEBUG='.*' is not valid; allowed: 0, 1, 2, 3 or 4"):
        settings.current()


def test_cache_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    for text, expected in [("~/x", "/home/somebody/x"), ("/a/../b", "/b"), ("here", str(pathlib.Path.cwd() / "here"))]:
        monkeypatch.setenv("EFFATTN_CACHE_DIR", text)
        assert settings.current().cache_dir == pathlib.Path(expected)


def test_every_variable_has_a_field_and_is_documented():
    fields = set(settings.Settings.__dataclass_fields__)
    assert {variable.field for variable in settings.VARIABLES} == fields
    documented = (pathlib.Path(__file__).parents[1] / "docs" / "settings.md").read_text()
    for variable in settings.VARIABLES:
        assert f"`{variable.name}`" in documented


def test_show_tells_up_to_the_level(monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a program that has not set up logging
    monkeypatch.setenv("EFFATTN_DEBUG", "2")
    for level in (1, 2, 3):
        settings.show(level, f"level {level}")
    captured = capsys.readouterr()
    assert captured.err == "[effattn] level 1\n[effattn] level 2\n"
    assert captured.out == ""


def test_show_uses_the_applications_logging(monkeypatch, caplog, capsys):
    monkeypatch.setenv("EFFATTN_DEBUG", "1")
    settings.show(1, "hello")
    assert [record.getMessage() for record in caplog.records] == ["hello"]
    assert "hello" not in capsys.readouterr().err


def test_warn_once(recwarn):
    for number in (1, 2, 3):
        settings.warn_once(f"number {number}", key="same")
        settings.warn_once("other")
    assert [str(warning.message) for warning in recwarn] == ["number 1", "other"]
