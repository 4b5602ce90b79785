import bnlab
from bnlab.checks import EVERY_CHECK


def test_explain_a_check(bnlab_command):
    code, out, _ = bnlab_command("explain", "bn107")
    assert code == 0
    assert out == bnlab.explain("BN107")
    assert out.startswith("# BN107 AmplifyingChannel\n")


def test_explain_lists_every_check(bnlab_command):
    code, out, _ = bnlab_command("explain")
    assert code == 0
    assert all(check.code in out and check.name in out for check in EVERY_CHECK)


def test_explain_an_unknown_code(bnlab_command):
    code, out, err = bnlab_command("explain", "BN999")
    assert (code, out) == (2, "")
    assert err.startswith("error: check: code must be one of BN101, ")
