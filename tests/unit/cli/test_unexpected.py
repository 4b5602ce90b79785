from bnlab.cli.unexpected import unexpected_line


class Nasty(Exception):
    def __str__(self):
        raise RuntimeError


def test_an_error_is_one_line_and_its_traceback_on_request(monkeypatch, capsys):
    monkeypatch.delenv("BNLAB_TRACEBACK", raising=False)
    assert unexpected_line(KeyError("a\nb"), "x.pt") == (
        "x.pt: command must end without an unexpected error, got KeyError: 'a\\nb'. "
        "Set BNLAB_TRACEBACK=1 to see where it comes from."
    )
    assert unexpected_line(ValueError("it ends.\n")).count(".") == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("BNLAB_TRACEBACK", "1")
    try:
        int("deep")
    except ValueError as error:
        unexpected_line(error)
    assert "test_unexpected.py" in capsys.readouterr().err


def test_errors_that_have_no_text(monkeypatch):
    monkeypatch.delenv("BNLAB_TRACEBACK", raising=False)
    assert unexpected_line(MemoryError()).startswith("bnlab: memory must suffice, got a MemoryError. ")
    assert "got Nasty. Set" in unexpected_line(Nasty())
