from tests.unit.report.html_samples import diagnosis, finding, layer

from bnlab.records import Quantity
from bnlab.report.html.findings import groups


def of(count, **options):
    layers = [layer(f"bn{index}") for index in range(count)]
    findings = [finding(f"bn{index}", **options) for index in range(count)]
    return diagnosis(layers, findings)


def test_a_row_refers_to_its_layer_and_writes_quantities_line_by_line():
    measured = {"a": Quantity(0.5, "std"), "b": Quantity(2.0, "1")}
    (group,) = groups(of(2, measured=measured), of(2, measured=measured).findings)
    assert [(row.layer, row.index, row.value) for row in group.rows] == [("bn0", 0, 0.5), ("bn1", 1, 0.5)]
    assert group.rows[0].measured == "a 0.5 std\nb 2 1"
    assert (group.where, group.hidden) == ("in 2 layers", 0)


def test_rows_there_is_no_room_for_are_counted():
    record = of(50)
    (group,) = groups(record, record.findings, room=10)
    assert (len(group.rows), group.hidden) == (10, 40)
    (group,) = groups(record, record.findings, room=0)
    assert (len(group.rows), group.hidden) == (3, 47)


def test_a_finding_on_the_network_has_no_layer_and_one_on_a_stranger_no_index():
    record = diagnosis([layer("a")], [finding(None, code="BN112"), finding("gone", code="BN102")])
    network, stranger = groups(record, record.findings)
    assert (network.where, network.rows[0].layer, network.rows[0].index) == ("in the network", None, None)
    assert (stranger.rows[0].layer, stranger.rows[0].index) == ("gone", None)
