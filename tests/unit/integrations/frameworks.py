"""Stand-ins of frameworks that are not installed; tests/integration has the real ones."""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from types import ModuleType

import bnlab.integrations


@contextmanager
def stand_in(name, modules):
    """Return a module of bnlab.integrations that sees modules with these contents instead of a framework.

    Args:
        name: The name of the module of bnlab.
        modules: The contents of each module of the framework, by its name; None for one that is not installed.
    """
    own = f"bnlab.integrations.{name}"
    names = [own, *modules]
    before = {key: sys.modules.pop(key, None) for key in names}
    for key, contents in modules.items():
        sys.modules[key] = module = None if contents is None else ModuleType(key)
        if module is not None:
            vars(module).update(contents)
    try:
        yield importlib.import_module(own)
    finally:
        for key, module in before.items():
            sys.modules.pop(key, None)
            if module is not None:
                sys.modules[key] = module
        vars(bnlab.integrations).pop(name, None)
