"""A target of which something is missing."""

from bnlab.diagnosis.incomplete import missing_parts, with_missing_parts
from bnlab.observe.evidence import Evidence

HALF = Evidence((), incomplete=(("bn1", "has no running_var"), ("", "lacks b.safetensors")))


def test_missing_parts_are_named_with_the_way_out():
    assert missing_parts(HALF) == (
        "BN layers must be whole, got parts of them: bn1 has no running_var, the file lacks b.safetensors. Name all "
        "files of the network together, or save its whole state dict in one: torch.save(model.state_dict(), path)."
    )
    assert missing_parts(Evidence(HALF.networks, incomplete=HALF.incomplete, way_to_the_rest="Name x.")).endswith(
        "b.safetensors. Name x."
    )
    assert with_missing_parts("no errors", HALF).startswith("bn1 has no running_var, the file lacks b.safetensors; no")


def test_a_whole_target_says_nothing():
    assert missing_parts(Evidence(())) is None
    assert with_missing_parts("no errors", Evidence(())) == "no errors"
