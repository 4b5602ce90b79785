from bnlab.checks.cases import healthy, network
from bnlab.diagnosis.check import _diagnose
from bnlab.diagnosis.settings import Settings
from bnlab.observe.evidence import Evidence
from bnlab.records import Target


def diagnose(*networks, **options):
    return _diagnose(Evidence(tuple(networks)), Target("checkpoint", "x.pt"), Settings.of(**options))


def test_layer_records_hold_what_a_picture_needs():
    layer = healthy("a", running_var=(1, 4, float("inf"), 9), weight=(1, 1, 1, 3), eps=0.0, momentum=None)
    (record,) = diagnose(network(layer)).layers
    assert (record.running_var.min, record.running_var.median, record.running_var.max) == (1, 4, 9)
    assert (record.gain.min, record.gain.max) == (0.5, 1)
    assert (record.momentum, record.eps, record.assumed, record.affine) == (None, 0.0, (), True)
    (record,) = diagnose(network(healthy("a", running_var=(float("nan"),) * 4))).layers
    assert record.running_var is None
