"""Reads the archives of ``torch.jit.save`` as data: the objects of its modules, and the constants in their code.

``data.pkl`` holds one object for each module, whose attributes are its parameters, buffers and inner modules. eps and
momentum are not among them: the compiler put them into the code. That code is text, of which two forms are read. A
scripted class lists its constants (``eps : Final[float] = 1e-05``). The forward of a traced class calls the operator
once, with numbers. Freezing turns all attributes into constants, so that only such calls show which tensors are BN.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bnlab.errors import NotACheckpoint
from bnlab.observe.files.pickle_data import Data, InertObject
from bnlab.observe.files.pickled_module import ModuleTree, Parts, StoredModule, add_module, is_plausible
from bnlab.observe.files.tensors import StoredTensor
from bnlab.observe.files.zip_archive import Archive
from bnlab.observe.files.zipped_pickle import read_zipped_pickle
from bnlab.observe.graph_state import NodeMode

__all__ = ["is_torchscript", "read_torchscript", "refuse_old_torchscript"]

_CLASSES = "__torch__"
_CONSTANTS = "constants.pkl"
_LARGEST_CODE = 4 << 20
_STATISTICS = ("running_mean", "running_var")
_ROLES = ("weight", "bias", *_STATISTICS)
_MANGLED = re.compile(r"\.___torch_mangle_\d+")
_CLASS = r"^class {name}\(Module\):\n((?:[ \t].*\n|\n)*)"
_FINAL = re.compile(r"^  (eps|momentum) : Final\[\w+\] = (\S+)$", re.MULTILINE)
_CALL = re.compile(r"\btorch\.batch_norm\(([^()\n]{0,2000})\)")
_CONSTANT = re.compile(r"CONSTANTS\.c(\d{1,9})")


def is_torchscript(archive: Archive, root: str) -> bool:
    """Return whether ``torch.jit.save`` wrote an archive."""
    return f"{root}{_CONSTANTS}" in archive


def refuse_old_torchscript(archive: Archive) -> None:
    """Refuse the archives of torch 1.0 to 1.3, which describe their modules in another way.

    Raises:
        NotACheckpoint: If it is one.
    """
    if any(name == "model.json" or name.endswith("/model.json") for name in archive.members):
        raise NotACheckpoint(
            "file must hold tensors, got a TorchScript program of torch 1.3 or older. "
            "Save its numbers instead: torch.save(torch.jit.load(path).state_dict(), new_path)."
        )


def read_torchscript(archive: Archive, root: str) -> Data:
    """Read the modules of a TorchScript archive down to their tensors, which stay unread.

    Args:
        archive: The archive.
        root: The folder in it that holds ``data.pkl``, with a slash behind it.

    Raises:
        ValueError: If the archive is damaged.
        TooMuchWork: If it asks for more work than any checkpoint does.
    """
    node = read_zipped_pickle(archive, root, folder=_storages(archive, root))
    if not isinstance(node, InertObject):
        return node
    code = _Code(archive, f"{root}code/")
    tree = ModuleTree(_kind(node), is_program=True)
    add_module(tree, node, code.parts, archive.content.budget)
    if not tree.layers:
        values = read_zipped_pickle(archive, root, _CONSTANTS, "constants/")
        for number, layer in enumerate(code.frozen(node, values if isinstance(values, tuple) else ())):
            name = "batch_norm" if number == 0 else f"batch_norm_{number}"
            tree.tensors.update({f"{name}.{role}": value for role, value in layer.tensors.items()})
            tree.layers[name] = layer.module
    return tree


def _storages(archive: Archive, root: str) -> str:
    """Return the folder of the tensors, which lie beside ``data.pkl`` in the archives of torch 1.4."""
    return "data/" if any(name.startswith(f"{root}data/") for name in archive.members) else "tensors/"


def _kind(node: InertObject) -> str:
    """Return the class of a module as its author called it."""
    return _MANGLED.sub("", node.kind.path).removeprefix(f"{_CLASSES}.")


@dataclass(frozen=True)
class _Frozen:
    tensors: Mapping[str, Any]
    module: StoredModule


@dataclass
class _Code:
    """The code of the classes in an archive.

    Attributes:
        archive: The archive.
        folder: Where the code lies in it.
    """

    archive: Archive
    folder: str
    _files: dict[str, str] = field(default_factory=dict)

    def parts(self, node: InertObject) -> Parts | None:
        """Return the parts of the object of a module; None for another object."""
        attributes = node.state
        if not isinstance(attributes, dict) or not node.kind.module.startswith(_CLASSES):
            return None
        buffers = {name: attributes[name] for name in _STATISTICS if name in attributes}
        tensors = {name: value for name, value in attributes.items() if isinstance(value, StoredTensor)}
        constants: dict[str, float | None] = {}
        mode = None
        if len(buffers) == len(_STATISTICS):
            constants, mode = self._constants(node)
        return Parts(
            kind=_kind(node),
            tensors=tensors,
            modules={name: value for name, value in attributes.items() if isinstance(value, InertObject)},
            attributes={**attributes, **constants},
            others={},
            buffers=buffers,
            mode=mode,
        )

    def frozen(self, node: InertObject, constants: tuple[Data, ...]) -> Iterator[_Frozen]:
        """Yield the BN layers of a frozen program, whose tensors are constants."""
        for call in _CALL.findall(self._body(node)):
            arguments = [part.strip() for part in call.split(",")]
            places = [_CONSTANT.fullmatch(part) for part in arguments[1:5]]
            numbers = [int(place[1]) if place else None for place in places]
            values = [constants[n] if n is not None and n < len(constants) else None for n in numbers]
            tensors = {role: value for role, value in zip(_ROLES, values, strict=False) if value is not None}
            if all(isinstance(tensors.get(role), StoredTensor) for role in _STATISTICS):
                stated, mode = _numbers(arguments)
                yield _Frozen(tensors, StoredModule("torch.batch_norm", False, True, stated, None, mode))

    def _constants(self, node: InertObject) -> tuple[dict[str, float | None], NodeMode | None]:
        """Return eps and momentum where the code of a class states them, and the statistics that it uses."""
        body = self._body(node)
        stated = {name: _number(text) for name, text in _FINAL.findall(body)}
        calls = _CALL.findall(body)
        mode = None
        if len(calls) == 1:
            numbers, mode = _numbers([part.strip() for part in calls[0].split(",")])
            stated = {**numbers, **stated}
        return {name: value for name, value in stated.items() if is_plausible(name, value)}, mode

    def _body(self, node: InertObject) -> str:
        """Return the code of a class; "" where it is not stored."""
        name = f"{self.folder}{node.kind.module.replace('.', '/')}.py"
        if name not in self._files:
            known = name in self.archive and self.archive.members[name].size <= _LARGEST_CODE
            data = self.archive.read(name, _LARGEST_CODE) if known else b""
            self._files[name] = data.decode("utf-8", "replace")
        match = re.search(_CLASS.format(name=re.escape(node.kind.name)), self._files[name], re.MULTILINE)
        return match[1] if match else ""


def _numbers(arguments: list[str]) -> tuple[dict[str, float | None], NodeMode | None]:
    """Return eps and momentum in the arguments of a call of the operator, and the statistics that it uses."""
    if len(arguments) != 9:
        return {}, None
    training, momentum, eps = arguments[5], _number(arguments[6]), _number(arguments[7])
    stated: dict[str, Any] = {"eps": eps}
    if momentum != 0:  # a cumulative average appears as 0 here, because its momentum changes
        stated["momentum"] = momentum
    mode = NodeMode("training", int(training == "True"), 0) if training in ("True", "False") else None
    return {name: value for name, value in stated.items() if is_plausible(name, value) and value is not None}, mode


def _number(text: str) -> Any:  # noqa: ANN401 - a number, None for "None", or a text that is neither
    if text == "None":
        return None
    try:
        return float(text)
    except ValueError:
        return text
