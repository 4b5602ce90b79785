import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "bnlab"
MODULES = sorted(SOURCE.rglob("*.py"))


def test_every_public_module_says_what_is_public():
    for path in MODULES:
        if path.name.startswith("_") and path.name != "__init__.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assigned = [ast.unparse(node.targets[0]) for node in tree.body if isinstance(node, ast.Assign)]
        assert "__all__" in assigned or len(tree.body) == 1, path


def test_only_the_command_line_prints():
    for path in MODULES:
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        prints = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        is_command = path.parent.name == "cli" or path.parts[-2:] in {("native", "build.py"), ("bnlab", "__main__.py")}
        assert not prints or is_command, path


def test_no_file_is_named_after_nothing():
    assert not {"utils.py", "helpers.py", "common.py"} & {
        path.name for path in ROOT.rglob("*.py") if not {".venv", ".venv-integration"} & set(path.parts)
    }


def test_no_unpickling_anywhere():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {"pickle", "dill", "joblib", "marshal"} & {alias.name for alias in node.names}, path
