import os

import pytest

from bnlab.cli.output import check_output, print_error, require_pages, write_output, write_text
from bnlab.errors import UnwritableFile, UsageError


def test_text_goes_to_stdout_or_into_a_file(tmp_path, capsys):
    write_text("a\n", None)
    write_text("b\n", tmp_path / "b.txt")
    assert capsys.readouterr().out == "a\n"
    assert (tmp_path / "b.txt").read_text() == "b\n"


def test_a_failed_write_names_the_option(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("bnlab.atomic_file.writing", refuse)
    with pytest.raises(UnwritableFile) as error:
        write_output(b"", tmp_path / "a")
    assert str(error.value) == f"--output: path must be writable, got {tmp_path / 'a'}: permission denied."


@pytest.mark.parametrize("name", [".", "none/a"])
def test_an_output_that_lies_nowhere_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="path must be a file in an existing folder"):
        check_output(tmp_path / name, [])


@pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
def test_an_output_that_is_an_input_is_refused_under_any_name(tmp_path):
    (tmp_path / "input").write_bytes(b"")
    (tmp_path / "link").symlink_to("input")
    check_output(tmp_path / "other", [str(tmp_path / "input")])
    with pytest.raises(UsageError, match="path must not be an input"):
        check_output(tmp_path / "link", [str(tmp_path / "input")])


def test_errors_are_one_harmless_line(capsys):
    print_error("two\nlines \x1b[31m")
    err = capsys.readouterr().err
    assert err.startswith("error: two")
    assert err.count("\n") == 1
    assert "\x1b" not in err


def test_pages_need_a_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"--format: jinja2 must be installed for html"):
        require_pages()
