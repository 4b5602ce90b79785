"""Files and modules are imported as their code expects, and nothing of it stays behind but the folder at the end."""

import os
import sys
from pathlib import Path

import pytest

from bnlab.cli.importing import hint, import_spec, is_spec


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_a_file_finds_the_files_beside_it(folder):
    write(
        folder / "nets/a.py", "from helper import VALUE\ndef build():\n    import late\n    return VALUE + late.VALUE\n"
    )
    write(folder / "nets/helper.py", "VALUE = 1\n")
    write(folder / "nets/late.py", "VALUE = 2\n")
    before = sys.path.copy()
    assert import_spec("nets/a.py:build", call=True) == 3
    assert sys.path == [*before, str(folder / "nets")]


def test_what_is_called_later_still_finds_them(folder):
    write(folder / "nets/a.py", "def metric(model, data):\n    import late\n    return late.VALUE\n")
    write(folder / "nets/late.py", "VALUE = 2\n")
    assert import_spec(str(folder / "nets/a.py:metric"), call=False)(None, None) == 2


def test_sys_path_is_restored_where_the_import_fails(folder):
    write(folder / "nets/a.py", "raise ValueError('at import')\n")
    before = sys.path.copy()
    for _ in range(2):
        with pytest.raises(ValueError, match="at import"):
            import_spec("nets/a.py:build", call=True)
    assert sys.path == [*before, str(folder / "nets")]
    assert not [name for name in sys.modules if name == "a" or name.startswith("a of")]


def test_a_folder_that_was_on_the_path_stays_in_its_place(folder):
    write(folder / "nets/a.py", "VALUE = 1\n")
    sys.path.insert(1, str(folder / "nets"))
    before = sys.path.copy()
    assert import_spec("nets/a.py:VALUE", call=False) == 1
    assert sys.path == before


def test_a_file_in_a_package_may_import_relatively(folder):
    for name in ("models/__init__.py", "models/deep/__init__.py"):
        write(folder / "src" / name, "")
    write(folder / "src/models/blocks.py", "WIDTH = 5\n")
    write(folder / "src/models/deep/net.py", "from ..blocks import WIDTH\nimport beside\ndef build(): return WIDTH\n")
    write(folder / "src/models/deep/beside.py", "")
    assert import_spec("src/models/deep/net.py:build", call=True) == 5
    assert sys.modules["models.deep.net"].__file__ == str(folder / "src/models/deep/net.py")


def test_a_file_is_imported_once_and_as_the_module_that_others_import(folder):
    write(folder / "a.py", "import b\nclass Net: pass\ndef same(): return b.a.Net is Net\n")
    write(folder / "b.py", "import a\n")
    assert import_spec("a.py:same", call=True)
    assert import_spec("./a.py:Net", call=False) is import_spec("a:Net", call=False)


@pytest.mark.parametrize("name", ["json.py", "sys.py", "my-net v2.py", "1.py", "class.py"])
def test_a_file_whose_name_is_taken_or_is_no_name(folder, name):
    import json

    write(folder / name, "VALUE = 7\ndef build(): return VALUE\n")
    assert import_spec(f"{name}:build", call=True) == 7
    assert import_spec(f"{name}:build", call=False) is import_spec(f"./{name}:build", call=False)
    assert sys.modules["json"] is json


def test_two_files_of_one_name(folder):
    write(folder / "a/net.py", "def build(): return 1\n")
    write(folder / "b/net.py", "def build(): return 2\n")
    assert [import_spec(f"{name}/net.py:build", call=True) for name in ("a", "b", "a")] == [1, 2, 1]


def test_a_file_that_does_not_exist(folder):
    with pytest.raises(FileNotFoundError, match=r"no file nte\.py in "):
        import_spec("nets/nte.py:build", call=True)
    assert hint("nets/nte.py:build") == ""
    write(folder / "nets/net.py", "")
    assert hint("nets/nte.py:build") == " Did you mean 'net.py'?"


def test_a_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    write(folder / "net.py", "VALUE = 3\n")
    assert import_spec("~/net.py:VALUE", call=False) == 3


def test_the_hint_names_what_a_module_defines(folder):
    write(
        folder / "net.py",
        "from pathlib import Path\ndef build(): pass\ndef _hidden(): pass\nclass Big:\n    def make(self): pass\n",
    )
    import_spec("net.py:build", call=False)
    assert hint("net.py:bild") == " Did you mean 'build'?"
    assert hint("net:xxxxxxxx") == " It has build and Big."
    assert hint("net:Big.mak") == " Did you mean 'make'?"
    assert hint("net:Pathh") == " It has build and Big."  # it is imported, not defined
    assert hint("net:build") == ""


def test_the_hint_names_a_module(folder):
    write(folder / "package/__init__.py", "")
    write(folder / "package/network.py", "def build(): pass\n")
    assert hint("pakage.network:build") == " Did you mean 'package'?"
    import_spec("package:__name__", call=False)
    assert hint("package.netwrk:build") == " Did you mean 'package.network'?"
    assert hint("package.network:build") == ""
    assert hint("zzz:build") == ""


@pytest.mark.parametrize("text", ["a.py", "a.py:", ".py:f", "a.py:1", "b/a.pyc:f", "a.py:f:g", "b/a.txt:f", "a.py:f()"])
def test_other_texts_are_no_specs(text):
    assert not is_spec(text)


def test_importing_imports_no_torch():
    import subprocess

    code = "import sys, bnlab.cli.importing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path.cwd()).returncode == 0


def test_what_the_code_prints_does_not_go_to_stdout(folder, capsys):
    write(folder / "net.py", "print('imported')\ndef build(): print('built')\n")
    import_spec("net.py:build", call=True)
    assert tuple(capsys.readouterr()) == ("", "imported\nbuilt\n")


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_pipe_is_not_read_as_a_program(tmp_path):
    os.mkfifo(tmp_path / "pipe.py")
    with pytest.raises(OSError, match=r"pipe\.py in .* is a folder, pipe or device"):
        import_spec(f"{tmp_path / 'pipe.py'}:build", call=True)
