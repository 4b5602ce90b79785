"""Imports what `package.module:callable` or `path/to/file.py:callable` names."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import operator
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from bnlab.cli.output import prints_on_stderr
from bnlab.wording import did_you_mean, enumerated

__all__ = ["FORMS", "hint", "import_spec", "is_spec"]

FORMS = "package.module:callable or file.py:callable"
"""The two forms of a spec, for messages."""

_IN_MODULE = re.compile(r"(?P<place>[^\W\d][\w.]*):(?P<attribute>[^\W\d][\w.]*)")
_IN_FILE = re.compile(r"(?P<place>.+\.py):(?P<attribute>[^\W\d][\w.]*)")
_MAX_NAMED = 5


def is_spec(text: str) -> bool:
    """Return whether a text has one of the two forms; identifiers are those of Python, in any script."""
    return _IN_MODULE.fullmatch(text) is not None or _IN_FILE.fullmatch(text) is not None


def import_spec(spec: str, *, call: bool) -> Any:
    """Import what a spec names, and call it if `call` is set.

    The folder of the file, or the current folder for a module, comes first in `sys.path` while this runs, and is its
    last entry afterwards, because an imported function may import more modules when it runs. A file inside a package
    is imported as a module of the package, so that its relative imports work. Exceptions of the import or the call
    pass through. What it prints goes to stderr.
    """
    place, attribute = _parts(spec)
    file = _file_of(spec)
    folders = [str(Path.cwd())] if file is None else _folders(file)
    with _importable(folders), prints_on_stderr():
        module = importlib.import_module(place) if file is None else _module_in(file)
        target: Any = operator.attrgetter(attribute)(module)
        return target() if call else target


def hint(spec: str) -> str:
    """Return a sentence, after a space, on what the user may have meant by a spec that cannot be imported, or ""."""
    place, attribute = _parts(spec)
    file = _file_of(spec)
    module = _loaded(file) if file is not None else sys.modules.get(place)
    if module is not None:
        return _hint_of_attribute(module, attribute)
    if file is None:
        return _hint_of_module(place)
    if file.exists():
        return ""
    return did_you_mean(file.name, (path.name for path in file.parent.glob("*.py")))


def _parts(spec: str) -> tuple[str, str]:
    match = _IN_FILE.fullmatch(spec) or _IN_MODULE.fullmatch(spec)
    assert match is not None  # callers ask is_spec first
    return match["place"], match["attribute"]


def _file_of(spec: str) -> Path | None:
    """Return the file that a spec names; None if it names a module."""
    match = _IN_FILE.fullmatch(spec)
    return None if match is None else Path(match["place"]).expanduser().absolute()


@contextmanager
def _importable(folders: list[str]) -> Iterator[None]:
    """Put folders first in `sys.path`, and afterwards last unless they were there before."""
    sys.path[:0] = folders
    try:
        yield
    finally:
        for folder in folders:
            with contextlib.suppress(ValueError):
                sys.path.remove(folder)
            if folder not in sys.path:
                sys.path.append(folder)


def _package_of(file: Path) -> tuple[Path, str]:
    """Return the folder from which a file can be imported, and the name of its module there."""
    folder, names = file.parent, [file.stem]
    while (folder / "__init__.py").is_file() and folder.name.isidentifier():
        names.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(names)


def _folders(file: Path) -> list[str]:
    return list(dict.fromkeys([str(_package_of(file)[0]), str(file.parent)]))


def _module_in(file: Path) -> ModuleType:
    """Import a file.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it is no regular file, but a pipe for example, from which Python would wait for a program.
    """
    loaded = _loaded(file)
    if loaded is not None:
        return loaded
    if not file.is_file():
        if file.exists():
            raise OSError(f"{file.name} in {file.parent} is a folder, pipe or device")
        raise FileNotFoundError(f"no file {file.name} in {file.parent}")
    name = _package_of(file)[1]
    if name not in sys.modules and all(part.isidentifier() for part in name.split(".")):
        importlib.invalidate_caches()  # the file may be new
        module = importlib.import_module(name)
        if _is_of(module, file):
            return module
    return _module_of_its_own(file)


def _module_of_its_own(file: Path) -> ModuleType:
    """Import a file whose name is that of another module, or is no name of a module."""
    name = f"{file.stem} of {file.parent}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None  # the suffix is .py
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _loaded(file: Path) -> ModuleType | None:
    """Return the module that was imported from a file before."""
    names = (_package_of(file)[1], f"{file.stem} of {file.parent}")
    modules = (sys.modules.get(name) for name in names)
    return next((module for module in modules if module is not None and _is_of(module, file)), None)


def _is_of(module: ModuleType, file: Path) -> bool:
    source = getattr(module, "__file__", None)
    with contextlib.suppress(OSError):
        return source is not None and Path(source).samefile(file)
    return False


def _hint_of_attribute(module: ModuleType, attribute: str) -> str:
    owner: Any = module
    for name in attribute.split("."):
        if not hasattr(owner, name):
            names = [own for own in _own_callables(owner) if not own.startswith("_")]
            have = f" It has {enumerated(names, _MAX_NAMED)}." if names else ""
            return did_you_mean(name, names) or have
        owner = getattr(owner, name)
    return ""


def _own_callables(owner: Any) -> Iterable[str]:
    """Return the names of what a module or class defines and does not import."""
    home = getattr(owner, "__name__", None) if isinstance(owner, ModuleType) else getattr(owner, "__module__", None)
    for name, value in vars(owner).items():
        value = getattr(owner, name, value)
        if callable(value) and getattr(value, "__module__", home) == home:
            yield name


def _hint_of_module(name: str) -> str:
    """Suggest a module beside the one that does not exist."""
    package, dot, _ = name.rpartition(".")
    if package and package not in sys.modules:
        return _hint_of_module(package)
    folders = getattr(sys.modules[package], "__path__", []) if package else [str(Path.cwd())]
    names = [f"{package}{dot}{module.name}" for module in pkgutil.iter_modules(folders)]
    return "" if name in names else did_you_mean(name, names)
