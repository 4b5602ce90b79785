def test_bench_names_what_there_is(bnlab_command):
    code, _, err = bnlab_command("bench", "nothing")
    assert code == 2
    names = (
        "accuracy, check, conversion, diagnose, estimators, fold, gpu, harm, hidden, hostile, mishaps, onednn, ops, "
        "recalibrate, small, training, watch"
    )
    assert err == f"error: bench: name must be one of {names}, got 'nothing'.\n"
    assert bnlab_command("bench", "mishap")[2].endswith("got 'mishap'. Did you mean 'mishaps'?\n")


def test_bench_outside_a_checkout(bnlab_command, monkeypatch, tmp_path):
    from bnlab.cli import bench

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "a" / "b" / "c" / "bench.py"))
    code, _, err = bnlab_command("bench", "check")
    assert code == 2
    assert "source checkout" in err
