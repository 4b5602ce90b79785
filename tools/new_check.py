"""Writes the skeleton of a check, and adds it to the catalogue and the contract test.

    python tools/new_check.py BN115 StoredStatisticsIgnored --group correctness --needs state

The skeleton passes every test that checks have to pass, so that each edit shows at once what it breaks. What it looks
for is a placeholder: docs/contributing/new-check.md leads through the edits.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from bnlab.checks import Group, Needs

ROOT = Path(__file__).parents[1]
CHECKS = Path("src/bnlab/checks")
CATALOG = CHECKS / "catalog.py"
CONTRACT = Path("tests/contracts/test_checks.py")

_STATE_CHECK = '''\
"""{code}: replace this with what the check looks for, in a few words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bnlab.checks.cases import of
from bnlab.checks.check import Case, Check, Group, Needs, in_channels, limit, show
from bnlab.observe.evidence import NetworkState
from bnlab.records import Finding, Quantity

__all__ = ["{name}"]


@dataclass(frozen=True)
class Limits:
    """Limits of {code}."""

    running_mean: float = limit(1e30, unit="input", source="replace this with where the number comes from")


class {name}(Check[Limits]):
    """A replacement for this line that names the bad pattern.

    ## What it does
    The check looks for channels whose abs(running_mean) is above a limit: replace this sentence and the code below.

    ## Why it matters
    Replace this sentence with the symptom that a user sees.

    ## Evidence
    The check reads `running_mean` as stored.

    ## Threshold
    Replace this sentence with what the limit means.

    ## Remedy
    `manual`: replace this with what helps.

    ## Sources
    Replace this with a paper, a page of torch's documentation or an issue that a reader can open.
    """

    code, group, needs = "{code}", Group.{group}, Needs.{needs}
    remedies = ("manual",)
    why = "replace this with the reason to care, in half a sentence"
    limits = Limits()

    def inspect(self, evidence: NetworkState) -> Iterator[Finding]:
        """Yield one finding per layer."""
        size = np.abs(evidence.running_mean)
        for layer, part, channels in evidence.where(np.isfinite(size) & (size > self.limits.running_mean)):
            largest = float(size[part][list(channels)].max())
            yield self.finding(
                layer,
                f"abs(running_mean) is {{show(largest)}} {{in_channels(channels, layer)}}, "
                f"must be <= {{show(self.limits.running_mean)}}",
                channels=channels,
                measured={{"abs(running_mean)": Quantity(largest, "input")}},
                threshold={{"abs(running_mean)": Quantity(self.limits.running_mean, "input")}},
            )

    CLEAN = (
        Case("trained", of),
        Case("without affine", lambda: of(weight=None, bias=None)),
    )
    BROKEN = (
        Case(
            "one channel",
            lambda: of(running_mean=(0, 1e31, 0, 0)),
            layers=("bn",),
            channels=(1,),
            measured={{"abs(running_mean)": 1e31}},
        ),
    )
'''

_MODEL_CHECK = '''\
"""{code}: replace this with what the check looks for, in a few words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bnlab.checks.cases import model, model_layer
from bnlab.checks.check import Case, Group, ModelCheck, Needs, limit, show
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer
from bnlab.records import Finding, Quantity

__all__ = ["{name}"]


@dataclass(frozen=True)
class Limits:
    """Limits of {code}."""

    eps: float = limit(1e290, unit="input^2", source="replace this with where the number comes from")


class {name}(ModelCheck[Limits]):
    """A replacement for this line that names the bad pattern.

    ## What it does
    The check looks for layers whose eps is above a limit: replace this sentence and the code below.

    ## Why it matters
    Replace this sentence with the symptom that a user sees.

    ## Evidence
    Replace this sentence with what the check reads, and with what it skips.

    ## Threshold
    Replace this sentence with what the limit means.

    ## Remedy
    `manual`: replace this with what helps.

    ## Sources
    Replace this with a paper, a page of torch's documentation or an issue that a reader can open.
    """

    code, group, needs = "{code}", Group.{group}, Needs.{needs}
    remedies = ("manual",)
    why = "replace this with the reason to care, in half a sentence"
    limits = Limits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return what is missing to judge a layer: replace the rule with that of the check."""
        return "{reason}" if {lacking} else None

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer."""
        for layer in evidence.layers:
            if layer.eps > self.limits.eps:
                yield self.finding(
                    layer,
                    f"eps is {{show(layer.eps)}}, must be <= {{show(self.limits.eps)}}",
                    measured={{"eps": Quantity(layer.eps, "input^2")}},
                    threshold={{"eps": Quantity(self.limits.eps, "input^2")}},
                )

    CLEAN = (
        Case("trained", model),
        Case("in eval mode", lambda: model(model_layer(training=False))),
    )
    BROKEN = (
        Case(
            "one layer",
            lambda: model(model_layer("a", {broken})),
            layers=("a",),
            measured={{"eps": 1e300}},
        ),
    )
'''

_LACKING = {
    Needs.MODEL: ("layer.state is None", "no running statistics", ""),
    Needs.OPTIMIZER: ("layer.decay is None", "not in the optimizer", 'decay={"weight": 0.0}, '),
    Needs.EXAMPLE: ("layer.execution is None", "not run on the example", ""),
    Needs.DATA: ("layer.data is None", "not run on the data", ""),
    Needs.TRAIN_DATA: ("layer.train_data is None", "not run on the training data", ""),
    Needs.LOSS: (
        "layer.gradient is None",
        "no gradient reaches it",
        'gradient=Gradient(producer="conv", relative=1.0, loss=1.0), ',
    ),
}
"""For each evidence: when a layer lacks it, the reason, and what the broken case must hold beside its eps."""

SKELETONS = (Needs.STATE, *_LACKING)
"""The evidence for which there is a skeleton. A check of a graph begins as a copy of that of BN115 or BN116."""


@dataclass(frozen=True)
class NewCheck:
    """What the author decides about a check.

    Attributes:
        code: Such as "BN115".
        name: The bad pattern, in CamelCase.
        group: The group, which fixes the level of the findings.
        needs: The evidence that it cannot do without.
    """

    code: str
    name: str
    group: Group
    needs: Needs

    @property
    def module(self) -> str:
        """Name of the check's module: "bn115_stored_statistics_ignored"."""
        return f"{self.code.lower()}_{re.sub(r'(?<!^)(?=[A-Z])', '_', self.name).lower()}"

    @property
    def source(self) -> str:
        """The text of the skeleton."""
        names = {"code": self.code, "name": self.name, "group": self.group.name, "needs": self.needs.name}
        if self.needs is Needs.STATE:
            return _STATE_CHECK.format(**names)
        lacking, reason, part = _LACKING[self.needs]
        text = _MODEL_CHECK.format(**names, lacking=lacking, reason=reason, broken=f"{part}eps=1e300")
        if self.needs is Needs.LOSS:
            text = text.replace("import ModelEvidence, ModelLayer", "import Gradient, ModelEvidence, ModelLayer")
        return text


def write(check: NewCheck, root: Path = ROOT) -> list[Path]:
    """Write the skeleton and add it where checks are listed; every file that changes is returned.

    Raises:
        ValueError: If the code or the name is in use.
    """
    catalog = (root / CATALOG).read_text(encoding="utf-8")
    contract = (root / CONTRACT).read_text(encoding="utf-8")
    modules = dict(re.findall(r"^from bnlab\.checks\.(bn\d+\w+) import (\w+)$", catalog, re.M))
    codes = {module[:5].upper() for module in modules}
    if check.code in codes or check.name in modules.values():
        raise ValueError(f"code and name must be new, got {check.code} {check.name}. Choose another one.")
    behind = next((module for module in sorted(modules) if module > check.module), None)
    new = {
        root / CHECKS / f"{check.module}.py": check.source,
        root / CATALOG: _listed(catalog, check, behind, modules),
        root / CONTRACT: _in_contract(contract, check, None if behind is None else behind[:5].upper()),
    }
    for path, text in new.items():
        path.write_text(text, encoding="utf-8")
    return [*new]


def _listed(catalog: str, check: NewCheck, behind: str | None, modules: dict[str, str]) -> str:
    """Return the catalogue with an import and an instance of the check, in the order of the codes."""
    line = f"from bnlab.checks.{check.module} import {check.name}\n"
    next_import = "from bnlab.checks.check import" if behind is None else f"from bnlab.checks.{behind} import"
    catalog = catalog.replace(next_import, line + next_import, 1)
    next_instance = "\n)\n" if behind is None else f"\n    {modules[behind]}(),\n"
    return catalog.replace(next_instance, f"\n    {check.name}(),{next_instance}", 1)


def _in_contract(contract: str, check: NewCheck, behind: str | None) -> str:
    """Return the contract test with the check in its table, in the order of the codes."""
    row = f'    "{check.code}": ("{check.name}", Level.{check.group.level.name}, Needs.{check.needs.name}),\n'
    start = contract.index("NAMES = {")
    place = contract.index("}\n" if behind is None else f'    "{behind}":', start)
    return contract[:place] + row + contract[place:]


def _code(text: str) -> str:
    if not re.fullmatch(r"BN\d{3}", text):
        raise argparse.ArgumentTypeError(f"must be BN and three digits, got {text!r}")
    return text


def _name(text: str) -> str:
    if not re.fullmatch(r"([A-Z][a-z0-9]+)+", text):
        raise argparse.ArgumentTypeError(f"must be CamelCase, such as StoredStatisticsIgnored, got {text!r}")
    return text


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, write the skeleton, and print what comes next."""
    parser = argparse.ArgumentParser(
        prog="python tools/new_check.py", description="Writes the skeleton of a check and adds it to the catalogue."
    )
    parser.add_argument(
        "code", type=_code, help="the number after the last of its hundred, see docs/contributing/new-check.md"
    )
    parser.add_argument("name", type=_name, help="the bad pattern in CamelCase; 'allow <name>' must read well")
    parser.add_argument("--group", choices=[group.name.lower() for group in Group], default="suspicious")
    parser.add_argument("--needs", choices=[needs.name.lower() for needs in SKELETONS], default="state")
    options = parser.parse_args(arguments)
    check = NewCheck(options.code, options.name, Group[options.group.upper()], Needs[options.needs.upper()])
    try:
        paths = write(check)
    except ValueError as error:
        parser.error(str(error))
    for path in paths:
        print(path.relative_to(ROOT))
    print(f"Next: replace what {paths[0].name} looks for, and run after each edit")
    print(f"  make docs && .venv/bin/pytest tests/contracts/test_checks.py -k '{check.code} or design or crashes'")


if __name__ == "__main__":
    main()
