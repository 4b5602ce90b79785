from bnlab.records import Level


def test_levels_are_ordered_by_severity():
    assert Level.ERROR.at_least(Level.WARNING)
    assert Level.WARNING.at_least(Level.WARNING)
    assert not Level.INFO.at_least(Level.WARNING)


def test_the_most_severe_level_has_rank_0():
    assert [level.rank for level in (Level.ERROR, Level.WARNING, Level.INFO)] == [0, 1, 2]
