import re
import shlex
from pathlib import Path

import pytest
from tools.build_docs import DOCS, pages

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_generated_pages_are_up_to_date():
    built = pages()
    assert {path.name for path in built} == {path.name for path in (DOCS / "checks").glob("*.md")}
    for path, text in built.items():
        assert path.read_text(encoding="utf-8") == text, f"run `make docs`: {path.name} is out of date"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


@pytest.mark.trains
def test_the_examples_of_the_readme_run_as_written(tmp_path, monkeypatch, capsys, bnlab_command):
    from bnlab.lab.experiments.train_eval import Config, TrainEval

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TrainEval, "quick", Config(batches=(2, 4), updates=(1, 200)))  # or one command takes seconds
    namespace = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "bn" not in printed.lower().split()
    assert "accuracy is 0." in printed
    assert "of the gap comes from stale statistics" in printed
    assert "error BN102 1 running_var is -0.001 in 1 of 8 channels, must be >= 0" in printed
    commands = [shlex.split(line, comments=True)[1:] for block in blocks("console") for line in block.splitlines()]
    assert len(commands) == 9
    for arguments in commands:
        code, out, err = bnlab_command(*arguments)
        assert (code, err) == (1 if arguments[0] == "check" else 0, "")
        assert out or "--output" in arguments


@pytest.mark.parametrize(
    "path",
    [
        "README.md",
        *(
            f"docs/{path}"
            for path in (
                "checkpoints.md",
                "benchmarks.md",
                "lab.md",
                "layers.md",
                "recalibrate.md",
                "convert.md",
                "diagnosis.md",
                "reports.md",
                "sarif.md",
                "kernels.md",
                "fold.md",
                "freeze.md",
                "checks/README.md",
            )
        ),
    ],
)
def test_links_lead_somewhere(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / path).parent.joinpath(link).exists(), link


def test_the_commands_of_the_readme_exist_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)
