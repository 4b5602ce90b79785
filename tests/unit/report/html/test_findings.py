from tests.unit.report.html_samples import diagnosis, finding, layer

from bnlab.records import Quantity
from bnlab.report.html.findings import groups
from bnlab.report.problems import problems_of


def of(count, codes=("BN401",), **options):
    layers = [layer(f"bn{index}") for index in range(count)]
    return diagnosis(layers, [finding(f"bn{index}", code, **options) for code in codes for index in range(count)])


def drawn(record, **options):
    return groups(record, problems_of(record), **options)


def test_a_row_refers_to_its_layer_and_writes_quantities_line_by_line():
    measured = {"a": Quantity(0.5, "std"), "b": Quantity(2.0, "1")}
    (group,) = drawn(of(2, measured=measured))
    assert [(row.layer, row.index, row.value) for row in group.rows] == [("bn0", 0, 0.5), ("bn1", 1, 0.5)]
    assert group.rows[0].measured == "a 0.5 std\nb 2 1"
    assert group.worst == group.rows[0]
    assert (group.where, group.also, group.hidden) == ("in 2 layers", "", 0)


def test_a_group_holds_a_cause_and_its_symptoms():
    (group,) = drawn(of(2, codes=("BN301", "BN401", "BN105")))
    assert (group.code, group.name, group.also) == ("BN105", "StatisticsBarelyUpdated", "BN301 and BN401")
    assert [row.code for row in group.rows] == ["BN105", "BN105", "BN301", "BN301", "BN401", "BN401"]
    assert group.evidence == "6 findings: measured values and thresholds"


def test_rows_that_there_is_no_room_for_are_counted():
    (group,) = drawn(of(50), room=10)
    assert (len(group.rows), group.hidden) == (10, 40)
    assert group.evidence.startswith("50 findings")
    (group,) = drawn(of(50), room=0)
    assert (len(group.rows), group.hidden) == (3, 47)


def test_a_few_layers_are_listed_and_the_others_counted():
    (group,) = drawn(of(2000))
    assert group.where == "in 2,000 layers"
    assert (group.layers[0], len(group.layers), group.more_layers) == (("bn0", 0), 8, 1992)
    (group,) = drawn(of(1))
    assert (group.layers, group.more_layers) == ((), 0)


def test_a_finding_on_the_network_has_no_layer_and_one_on_a_stranger_no_index():
    record = diagnosis([layer("a")], [finding(None, code="BN112"), finding("gone", code="BN102")])
    network, stranger = drawn(record)
    assert (network.where, network.worst.layer, network.worst.index) == ("in the network", None, None)
    assert (stranger.worst.layer, stranger.worst.index) == ("gone", None)


def test_a_remedy_is_for_the_layers_whose_findings_name_it():
    layers = [layer(name) for name in "abc"]
    findings = [
        finding("a", "BN105", remedies=("manual",)),
        finding("b", "BN105", remedies=("recalibrate",)),
        finding("b", "BN401", remedies=("recalibrate",)),
        finding("a", "BN401", remedies=("manual",)),
        finding("c", "BN105", remedies=("manual",)),
    ]
    (group,) = drawn(diagnosis(layers, findings))
    steps = {remedy.name: remedy for remedy in group.remedies}
    assert steps["recalibrate"].python == "bnlab.recalibrate(model, train_data, layers=['b'])"
    assert steps["manual"].command == "bnlab explain BN105"
    (group,) = drawn(diagnosis(layers, [finding(name) for name in "abc"]))
    assert group.remedies[0].python == "bnlab.recalibrate(model, train_data)"
