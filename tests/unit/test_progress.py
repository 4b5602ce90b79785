from bnlab.progress import reporting


def test_nothing_is_shown_where_nobody_watches(capsys):
    with reporting() as advance:
        for _ in range(3):
            advance("statistics")
        advance("metric")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
