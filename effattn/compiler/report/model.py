"""The report on every attention of a model. Text and HTML are views of its records."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from effattn.compiler.report import html, text
from effattn.compiler.report.records import Contents


@dataclass
class Report(Contents):
    """The report on one model."""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "versions": versions(),
            "policy": {"name": self.policy, "toml": self.policy_toml, "shortcomings": list(self.shortcomings)},
            "seconds": self.seconds,
            "counts": asdict(self.counts) | {"total": self.counts.total, "left_alone": self.counts.left_alone},
            "sites": [asdict(site) for site in self.sites],
            "missed": [asdict(missed) for missed in self.missed],
            "outside": [asdict(outside) for outside in self.outside],
            "graphs": [
                {
                    "before": graph.before,
                    "after": graph.after,
                    "erased": graph.erased,
                    "failure": graph.failure,
                    "calls": graph.calls,
                    "passes": [asdict(record) for record in graph.passes],
                }
                for graph in self.graphs
            ],
            "stanza": self.stanza,
        }

    def to_html(self, path: str | Path) -> Path:
        """Write the report as one HTML page and return its path."""
        path = Path(path)
        path.write_text(html.render(self.to_dict()), encoding="utf-8")
        return path

    def __str__(self) -> str:
        return text.render(self)


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("effattn", "triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
