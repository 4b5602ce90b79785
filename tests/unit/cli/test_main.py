import bnlab


def test_version(bnlab_command):
    assert bnlab_command("--version")[:2] == (0, f"bnlab {bnlab.__version__}\n")
