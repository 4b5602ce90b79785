"""Keeps the libraries offline, and writes the record of a run from which docs/integrations.md is made."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections import defaultdict
from pathlib import Path

import pytest

RECORD = Path(__file__).parents[2] / "build" / "integrations.json"

os.environ.update(
    HF_HUB_OFFLINE="1",
    YOLO_OFFLINE="true",
    YOLO_AUTOINSTALL="false",
    YOLO_CONFIG_DIR=str(RECORD.parent / "ultralytics"),  # it writes settings when it is imported
    ACCELERATE_USE_CPU="true",
)


def pytest_collection_modifyitems(items):
    """Run all cells of a model in one process, which builds it once."""
    for item in items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else item.name
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}-{case}"))


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder())


class Recorder:
    """Collects the cells, in this process or from the workers."""

    def __init__(self):
        self.libraries = defaultdict(lambda: {"lines": "", "models": defaultdict(dict)})

    def pytest_runtest_logreport(self, report):
        known = dict(report.user_properties)
        if report.when != "call" or "library" not in known:
            return
        library = self.libraries[known["library"]]
        if "lines" in known:
            library["lines"] = known["lines"]
        if "action" in known:
            library["models"][known["case"]][known["action"]] = {
                "passed": report.passed,
                "text": known.get("text", ""),
                "left": known.get("left", {}),
                "reason": str(report.longrepr) if report.failed else known.get("reason", ""),
            }

    def pytest_sessionfinish(self):
        if not self.libraries:
            return
        names = ("torch", *self.libraries)
        versions = {name: importlib.metadata.version(name).partition("+")[0] for name in names}
        record = {"versions": versions, "libraries": self.libraries}
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
