import dataclasses

from bnlab.checks.cases import healthy, network
from bnlab.diagnosis.check import _diagnose
from bnlab.diagnosis.settings import Settings
from bnlab.observe.evidence import Evidence
from bnlab.records import (
    Target,
)

UNIT = (healthy("a"), healthy("layer1.0.bn1", running_var=(-9.8e-4, 1, 1, 1)), healthy("b", weight=(1e-6, 1, 1, 1)))


def diagnose(*layers, networks=None, left_alone=(), **options):
    evidence = Evidence(networks or (network(*layers),), left_alone)
    return _diagnose(evidence, Target("checkpoint", "model.pt"), Settings.of(**options))


def many(count):
    name = "backbone.stage{}.block.{}.branch.conv_bn_relu.bn"
    layers = [healthy(name.format(i // 50, i), running_var=(-1 if i % 3 else 1, 1, 1, 1)) for i in range(count)]
    return [dataclasses.replace(layer, num_batches_tracked=1_700_000 + i) for i, layer in enumerate(layers)]
