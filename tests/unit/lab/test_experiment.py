import pytest
from tests.unit.lab.halving import Config, Halving

from bnlab.lab import Experiment


def test_the_title_is_the_first_line_of_the_docstring():
    assert Halving().title == "A number is halved."


def test_settings_stay_as_they_are_where_nothing_is_to_be_chosen():
    config = Config(factor=0.45)
    assert Halving().resolve(config) is config


def test_no_folder_is_named_unless_a_run_names_one():
    assert Halving().data_dir is None


def test_a_run_and_a_figure_are_what_an_experiment_must_have():
    class Incomplete(Experiment):
        """Has neither."""

    with pytest.raises(TypeError, match=r"figure.*run|run.*figure"):
        Incomplete()
