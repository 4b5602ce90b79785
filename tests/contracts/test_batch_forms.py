"""Every command takes every form of batch, and measures the same on each of them."""

import collections
import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import nn

import bnlab
from bnlab.errors import UsageError
from bnlab.lab import metrics


class Classifier(nn.Module):
    """A classifier of images, whose forward the subclasses name in other ways."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def features(self, x):
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))


class One(Classifier):
    def forward(self, x):
        return self.features(x)


class Two(Classifier):
    def forward(self, x, mask):
        return self.features(x * mask)


class Face(Classifier):
    def forward(self, pixel_values=None, labels=None):
        return {"loss": None, "logits": self.features(pixel_values)}


class Detector(Classifier):
    def forward(self, images, targets=None):
        return self.features(torch.stack(tuple(images)))


class Pair(NamedTuple):
    image: torch.Tensor
    target: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Sample:
    x: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


class Encoding(collections.UserDict):
    """Like the BatchEncoding of transformers."""

    def to(self, device):
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


def tensors(index):
    generator = torch.Generator().manual_seed(index)
    x = 2 + torch.randn(12, 3, 6, 6, generator=generator)
    return x, torch.ones(12, 1, 1, 1), torch.randint(0, 3, (12,), generator=generator)


DATA = [tensors(index) for index in range(4)]
"""Batches on the CPU, where loaders make them: each command moves them to the device of its model."""
NAMES = ["name"] * 12

FORMS = {
    "tuple": (One, lambda x, _, y: (x, y)),
    "list": (One, lambda x, _, y: [x, y]),
    "named tuple": (One, lambda x, _, y: Pair(x, y)),
    "two elements": (Two, lambda x, mask, y: (x, mask, y)),
    "nested": (Two, lambda x, mask, y: ((x, mask), y)),
    "nested with names": (One, lambda x, _, y: ((x, NAMES), y)),
    "nested with a tensor that is not used": (One, lambda x, mask, y: [[x, mask], y]),
    "dict of keywords": (Two, lambda x, mask, y: {"x": x, "mask": mask, "labels": y, "names": NAMES}),
    "dict of an image": (One, lambda x, _, y: {"image": x, "label": y, "names": NAMES}),
    "encoding": (Face, lambda x, _, y: Encoding({"pixel_values": x, "labels": y, "size": y})),
    "dataclass": (Two, lambda x, mask, y: Sample(x, mask, y)),
    "images and targets": (Detector, lambda x, _, y: (list(x), y)),
    "images and targets in tuples": (Detector, lambda x, _, y: (tuple(x), y)),
}


def built(kind, device):
    torch.manual_seed(0)
    return kind().to(device)


def expected_mean(device):
    model = built(One, device)
    with torch.no_grad():
        return model.conv(torch.cat([x for x, _, _ in DATA]).to(device)).mean((0, 2, 3))


@pytest.fixture(params=FORMS, ids=lambda name: name.replace(" ", "-"))
def form(request, device):
    kind, make = FORMS[request.param]
    return built(kind, device), [make(*batch) for batch in DATA]


def test_recalibration_is_that_of_the_tensors(form, device):
    model, batches = form
    receipt = bnlab.recalibrate(model, batches)
    assert torch.allclose(model.bn.running_mean, expected_mean(device), atol=1e-5)
    assert receipt.changes.notes[0].startswith("from 4 batches, 48 samples")


def test_check_measures_the_gap_and_the_metric(form, device):
    model, batches = form
    diagnosis = bnlab.check(model, data=batches, train_data=batches, metric=metrics.accuracy)
    plain = [(x, y) for x, _, y in DATA]
    assert diagnosis.failure is None
    assert diagnosis.numbers.eval_running == pytest.approx(metrics.accuracy(built(One, device).eval(), plain))
    (layer,) = diagnosis.layers
    assert (layer.calls, layer.gap is not None) == (1, True)
    assert all(outcome.status != "crashed" for outcome in diagnosis.outcomes)


def test_fold_and_convert_prove_their_changes(form):
    model, batches = form
    bnlab.recalibrate(model, batches)
    assert isinstance(bnlab.fold(model, batches[0]).model.bn, nn.Identity)
    receipt = bnlab.convert(model, bnlab.nn.BatchNorm2d, fuse=True, example=batches[0])
    assert isinstance(model.bn, bnlab.nn.BatchNorm2d)
    receipt.undo()
    assert type(model.bn) is nn.BatchNorm2d


def test_labels_stand_behind_all_inputs(device):
    """The mask of a model with two inputs is no label."""
    model = built(Two, device)
    mask = torch.ones(12, 1, 1, 1, dtype=torch.int64)
    data = [(x, mask, y) for x, _, y in DATA]
    assert metrics.accuracy(model.eval(), data) == metrics.accuracy(
        built(One, device).eval(), [(x, y) for x, _, y in DATA]
    )
    verdicts = bnlab.check(model, data=data, train_data=data).statistics
    assert verdicts is None or verdicts.decided_by in (None, "cross-entropy")
    with pytest.raises(UsageError, match="batches must be"):
        metrics.accuracy(model, [(x, mask) for x, _, _ in DATA])


def test_targets_of_any_form_stay_beside_images(device):
    """The targets of a detector are a list of dicts."""
    model = built(Detector, device)
    data = [(list(x), [{"boxes": torch.ones(3, 4), "labels": y[:3]} for _ in range(12)]) for x, _, y in DATA]

    def loss(model, batch):
        images, targets = batch
        assert len(images) == len(targets)
        return model(images, targets).square().mean()

    diagnosis = bnlab.check(model, data=data, train_data=data, loss=loss)
    assert diagnosis.failure is None
    assert diagnosis.numbers is not None


@pytest.mark.parametrize("call", ["check", "recalibrate", "fold", "convert", "repair"])
def test_a_batch_that_does_not_fit_is_one_error(call, device):
    model, batches = built(Two, device), [{"picture": x, "visible": mask} for x, mask, _ in DATA]
    calls = {
        "check": lambda: bnlab.check(model, data=batches),
        "recalibrate": lambda: bnlab.recalibrate(model, batches),
        "fold": lambda: bnlab.fold(model, batches[0]),
        "convert": lambda: bnlab.convert(model, bnlab.nn.BatchNorm2d, fuse=True, example=batches[0]),
        "repair": lambda: bnlab.repair(model, data=batches),
    }
    with pytest.raises(UsageError) as caught:
        calls[call]()
    assert str(caught.value) == (
        'Two: a batch must fit forward(x, mask), got {"picture": float32 (12, 3, 6, 6), "visible": float32 '
        '(12, 1, 1, 1)}. Pass forward=lambda model, batch: model(batch["picture"], batch["visible"]).'
    )


def test_an_error_inside_the_model_is_part_of_the_diagnosis(device):
    diagnosis = bnlab.check(built(One, device), data=[torch.ones(4, 5, 6, 6)])
    assert "Given groups=1" in diagnosis.failure


class TestStreams:
    """A function returns a new iterator for each pass."""

    def stream(self):
        for x, _, y in DATA:
            yield x, y

    def test_recalibrate(self, device):
        model = built(One, device)
        bnlab.recalibrate(model, self.stream, layerwise=True)
        assert torch.allclose(model.bn.running_mean, expected_mean(device), atol=1e-5)

    def test_check_and_repair(self, device):
        diagnosis = bnlab.check(built(One, device), data=self.stream, metric=metrics.accuracy)
        assert diagnosis.failure is None
        receipt = bnlab.repair(built(One, device), data=self.stream, max_batches=None, force=True, safety="statistics")
        assert receipt.changes.notes is not None

    def test_metrics(self, device):
        model = built(One, device).eval()
        assert metrics.accuracy(model, self.stream) == metrics.accuracy(model, list(self.stream()))

    def test_the_same_iterator_twice_is_refused(self, device):
        batches = self.stream()
        with pytest.raises(UsageError, match="batches: the function must return a new iterator on each call"):
            bnlab.recalibrate(built(One, device), lambda: batches, layerwise=True)

    @pytest.mark.parametrize("result", [None, 3, torch.ones(2), "text", {"x": 1}])
    def test_what_is_not_iterable_is_refused(self, result, device):
        with pytest.raises(UsageError, match="batches: the function must return an iterable of batches, got"):
            bnlab.recalibrate(built(One, device), lambda: result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_under_autocast_are_exact(dtype, device):
    """The inputs of the layer are rounded, and their statistics are not."""
    model, batches = built(One, device), [x for x, _, _ in DATA]
    with torch.no_grad(), torch.autocast(device.type, dtype):
        inputs = [model.conv(x.to(device)) for x in batches]
    assert inputs[0].dtype == dtype
    wide = torch.cat(inputs).double()
    var = wide.var((0, 2, 3))
    with torch.autocast(device.type, dtype):
        diagnosis = bnlab.check(model, data=batches, train_data=batches)
        bnlab.recalibrate(model, batches)
    assert diagnosis.failure is None
    assert model.bn.running_mean.dtype == torch.float32
    assert torch.allclose(model.bn.running_mean.double(), wide.mean((0, 2, 3)), rtol=0, atol=1e-6)
    assert torch.allclose(model.bn.running_var.double(), var, rtol=1e-5)
    other = built(One, device)

    def forward(model, batch):
        with torch.autocast(device.type, dtype):
            return model(batch)

    bnlab.recalibrate(other, batches, forward=forward)
    assert torch.equal(other.bn.running_mean, model.bn.running_mean)


class TestGraphs:
    """Graphs of PyTorch Geometric."""

    @pytest.fixture
    def geometric(self):
        return pytest.importorskip("torch_geometric", exc_type=ImportError)

    def graphs(self, geometric):
        from torch_geometric.loader import DataLoader

        def graph(index):
            generator = torch.Generator().manual_seed(index)
            edges = torch.randint(0, 12, (2, 30), generator=generator)
            x, y = 1 + 2 * torch.randn(12, 4, generator=generator), torch.randint(0, 3, (1,), generator=generator)
            return geometric.data.Data(x=x, edge_index=edges, y=y)

        return DataLoader([graph(index) for index in range(32)], batch_size=8)

    def network(self, geometric, device):
        from torch_geometric.nn import GCNConv, global_mean_pool

        class Network(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn, self.head = GCNConv(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

            def forward(self, data):
                x = self.bn(self.conv(data.x, data.edge_index)).relu()
                return self.head(global_mean_pool(x, data.batch))

        return built(Network, device)

    def test_graphs_are_whole(self, geometric, device):
        model, loader = self.network(geometric, device), self.graphs(geometric)
        diagnosis = bnlab.check(model, data=loader, train_data=loader, metric=metrics.accuracy)
        assert diagnosis.failure is None
        assert diagnosis.numbers is not None
        receipt = bnlab.recalibrate(model, loader)
        assert receipt.changes.notes[0].startswith("from 4 batches, 32 samples")
        with torch.no_grad():
            inputs = torch.cat([model.conv(batch.x.to(device), batch.edge_index.to(device)) for batch in loader])
        assert torch.allclose(model.bn.running_mean, inputs.mean(0), atol=1e-5)
        measured = bnlab.fold(model, next(iter(loader))).changes.measurements
        assert measured[-1].what == "largest error on 2 random inputs"

    def test_a_model_of_tensors_gets_the_attributes(self, geometric, device):
        from torch_geometric.nn import GCN

        torch.manual_seed(0)
        model, loader = GCN(4, 8, 2, 3, norm="batch_norm").to(device), self.graphs(geometric)
        assert bnlab.check(model, data=loader).failure is None
        bnlab.recalibrate(model, loader)
        assert model.norms[0].module.running_mean.abs().max() > 0

    def test_one_graph_has_its_nodes_as_samples(self, geometric, device):
        model = built(lambda: geometric.nn.GCN(4, 8, 2, 3, norm="batch_norm"), device)
        graph = geometric.data.Data(x=torch.randn(100, 4), edge_index=torch.randint(0, 100, (2, 300)))
        assert bnlab.recalibrate(model, [graph]).changes.notes[0].startswith("from 1 batch, 100 samples")
