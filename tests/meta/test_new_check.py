"""tools/new_check.py writes checks that pass what checks have to pass."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tools.new_check import CATALOG, CHECKS, CONTRACT, SKELETONS, NewCheck, main, write

from bnlab.checks import Group, Needs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    """Return a copy of what a check is made of, without the codes that the tests write."""
    kept_out = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=kept_out)
    for path in (CONTRACT, Path("pyproject.toml")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    for code in ("BN199", "BN210"):
        remove(code, tmp_path)
    return tmp_path


def remove(code, root):
    """Remove a check that somebody has added since under the code of an example."""
    for module in (root / CHECKS).glob(f"{code.lower()}_*.py"):
        name = re.search(r"^class (\w+)\(", module.read_text(encoding="utf-8"), re.M)[1]
        module.unlink()
        for path in (root / CATALOG, root / CONTRACT):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            path.write_text("".join(line for line in lines if not re.search(rf"\b{name}\b", line)), encoding="utf-8")


def assert_contract_holds(checkout, codes):
    """Run the contract tests of some checks in a copy of the project, then ruff on their files."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", " or ".join([*codes, "design"])]
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    ran = subprocess.run(
        [*command, str(CONTRACT)], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-3000:]
    ruff = shutil.which("ruff") or str(Path(sys.executable).parent / "ruff")
    new = [str(path) for code in codes for path in (checkout / CHECKS).glob(f"{code.lower()}_*.py")]
    subprocess.run([ruff, "check", str(checkout / CATALOG), *new], cwd=checkout, check=True)
    subprocess.run([ruff, "format", "--check", str(checkout / CATALOG), *new], cwd=checkout, check=True)


def test_a_skeleton_for_each_kind_of_evidence_passes_the_contract_of_checks(checkout):
    codes = []
    for index, needs in enumerate(SKELETONS):
        check = NewCheck(f"BN{690 + index}", f"Planted{needs.name.title().replace('_', '')}", Group.NOTE, needs)
        written = write(check, checkout)
        assert written == [checkout / CHECKS / f"{check.module}.py", checkout / CATALOG, checkout / CONTRACT]
        codes.append(check.code)
    assert_contract_holds(checkout, codes)


def test_the_worked_example_of_the_guide_passes_the_contract_of_checks(checkout):
    guide = (ROOT / "docs" / "contributing" / "new-check.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"^```python\n(.*?)^```", guide, re.M | re.S)
    module, *_ = write(NewCheck("BN199", "ShutChannel", Group.NOTE, Needs.STATE), checkout)
    assert f"`{module.relative_to(checkout).as_posix()}`" in guide
    module.write_text(source, encoding="utf-8")
    assert_contract_holds(checkout, ["BN199"])


def test_a_check_is_listed_in_the_order_of_the_codes(checkout):
    write(NewCheck("BN210", "InTheMiddle", Group.SUSPICIOUS, Needs.MODEL), checkout)
    catalog = (checkout / CATALOG).read_text(encoding="utf-8")
    lines = catalog.splitlines()
    instance = lines.index("    InTheMiddle(),")
    assert lines[instance - 1 : instance + 2 : 2] == ["    EvalUsesBatchStatistics(),", "    WeightDecayOnAffine(),"]
    imported = lines.index("from bnlab.checks.bn210_in_the_middle import InTheMiddle")
    assert ".bn209_" in lines[imported - 1]
    assert ".bn211_" in lines[imported + 1]
    contract = (checkout / CONTRACT).read_text(encoding="utf-8").splitlines()
    row = contract.index('    "BN210": ("InTheMiddle", Level.WARNING, Needs.MODEL),')
    assert "BN209" in contract[row - 1]
    assert "BN211" in contract[row + 1]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["BN102", "SomethingNew"], "code and name must be new, got BN102 SomethingNew. Choose another one."),
        (["BN698", "DeadChannel"], "code and name must be new, got BN698 DeadChannel. Choose another one."),
        (["BN9", "SomethingNew"], "must be BN and three digits, got 'BN9'"),
        (["BN698", "dead_channel"], "must be CamelCase, such as StoredStatisticsIgnored, got 'dead_channel'"),
        (["BN698", "SomethingNew", "--needs", "luck"], "invalid choice: 'luck'"),
    ],
)
def test_what_cannot_be_a_new_check_is_refused_in_one_line(arguments, error, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert error in capsys.readouterr().err
    assert not (ROOT / CHECKS / "bn698_something_new.py").exists()
