from tests.unit.report.html_samples import finding

from bnlab.records import Level
from bnlab.report.html.markers import LayerFindings, by_layer

ERROR = finding("a", code="BN102", level=Level.ERROR, channels=(1, 2))
NOTE = finding("a", code="BN108", level=Level.INFO, channels=None)
AGAIN = finding("a", code="BN102", level=Level.ERROR, channels=(2, 5))


def test_a_layer_is_marked_by_its_worst_finding():
    marked = LayerFindings((NOTE, ERROR, AGAIN))
    assert marked.level is Level.ERROR
    assert marked.severity > LayerFindings((NOTE,)).severity > LayerFindings().severity == 0
    assert LayerFindings().level is None


def test_a_code_is_named_once_with_its_level():
    marked = LayerFindings((ERROR, AGAIN, NOTE))
    assert marked.codes == ["BN102", "BN108"]
    assert marked.codes_with_levels == "BN102 error, BN108 note"
    assert marked.channels() == {1, 2, 5}


def test_findings_go_to_their_layers_and_those_of_the_network_to_none():
    marked = by_layer([ERROR, finding(None), finding("b"), NOTE], ["b", "a", "c"])
    assert [len(one.findings) for one in marked] == [1, 2, 0]
    assert marked[1].findings == (ERROR, NOTE)
