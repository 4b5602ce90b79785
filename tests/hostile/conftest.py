"""What the tests of damaged files share."""

import pytest
from tests.hostile.corpus import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return {sample.name: sample for sample in write_corpus(tmp_path_factory.mktemp("corpus"))}


@pytest.fixture
def sample(corpus, name):
    """The honest file of the format `name`, which a test has as a parameter."""
    if name not in corpus:
        pytest.skip("the writer of this format is not installed")
    return corpus[name]
