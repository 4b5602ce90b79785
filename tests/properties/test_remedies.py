"""Random sequences of freeze, unfreeze, recalibrate, convert, training and undo keep what they promise to keep."""

from __future__ import annotations

import copy
import itertools

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.traces import differences, trace_of
from torch import nn
from torch.testing import assert_close

import bnlab
from bnlab.errors import UsageError

KINDS = (nn.BatchNorm1d, bnlab.nn.BatchNorm1d, bnlab.nn.BatchRenorm1d, bnlab.nn.GhostBatchNorm1d)
LAYERS = ("1", "4")
BATCHES = [3 + 2 * torch.randn(16, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3, momentum=0.3), nn.Linear(3, 2)
    ).double()


def expected_output(model, x):
    """The formula of eval mode, written out: it must hold whatever the layers have become."""
    for module in model:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            scale = module.weight / (module.running_var + module.eps).sqrt()
            x = (x - module.running_mean) * scale + module.bias
        else:
            x = module(x)
    return x


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def agree(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Remedies(RuleBasedStateMachine):
    """A model on which actions are stacked and taken back, beside what must be true of it."""

    @initialize()
    def build(self):
        self.model = network()
        self.batches = [batch.double() for batch in BATCHES]
        self.momenta = {path: self.model.get_submodule(path).momentum for path in LAYERS}
        self.keys = set(self.model.state_dict())
        self.objects = self.tensors()
        self.receipts = []

    def tensors(self):
        """The tensors of the state dict; layers of bnlab have a few of their own beside them."""
        named = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        return {name: named[name] for name in self.keys}

    def remember(self, action):
        """Do something that gives a receipt; note what was there before."""
        before = state(self.model), [type(module) for module in self.model], self.grads(), self.switches()
        self.receipts.append((action(), before))

    def grads(self):
        return {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}

    def switches(self):
        return {path: self.model.get_submodule(path).track_running_stats for path in LAYERS}

    @rule(
        normaliser=st.booleans(),
        buffers=st.booleans(),
        affine=st.booleans(),
        layers=st.sampled_from([None, ["1"], ["4"]]),
    )
    def freeze(self, normaliser, buffers, affine, layers):
        if normaliser or buffers or affine:
            self.remember(
                lambda: bnlab.freeze(self.model, layers=layers, normaliser=normaliser, buffers=buffers, affine=affine)
            )

    @rule(layers=st.sampled_from([None, ["1"], ["4"]]))
    def unfreeze(self, layers):
        self.remember(lambda: bnlab.unfreeze(self.model, layers=layers))

    @rule(estimator=st.sampled_from(["population", "within-batch"]), layerwise=st.booleans())
    def recalibrate(self, estimator, layerwise):
        frozen = [self.is_frozen(path) for path in LAYERS]
        before = state(self.model)
        try:
            self.remember(lambda: bnlab.recalibrate(self.model, self.batches, estimator=estimator, layerwise=layerwise))
        except UsageError:
            assert all(frozen)
            assert agree(state(self.model), before)
            return
        after = state(self.model)
        for path, is_frozen in zip(LAYERS, frozen, strict=True):
            name = f"{path}.running_var"
            assert not is_frozen or torch.equal(before[name], after[name])
        counters = {int(after[f"{path}.num_batches_tracked"]) for path in LAYERS}
        assert counters == {max(44, *(int(before[f"{path}.num_batches_tracked"]) for path in LAYERS))}

    def is_frozen(self, path):
        layer = self.model.get_submodule(path)
        keeps_statistics = isinstance(layer, bnlab.nn.FrozenBatchNorm1d.__mro__[1]) or not layer.track_running_stats
        return keeps_statistics or (self.model.training and not layer.training)

    @rule(kind=st.sampled_from(KINDS))
    def convert(self, kind):
        before, kinds = state(self.model), [type(module) for module in self.model]
        try:
            self.remember(lambda: bnlab.convert(self.model, kind))
        except UsageError as refusal:
            if "BatchRenorm1d: track_running_stats must be True" not in str(refusal):
                raise
            assert not all(self.switches().values())
            assert agree(state(self.model), before)
            assert [type(module) for module in self.model] == kinds

    @rule()
    def convert_to_something_that_cannot_be(self):
        before, kinds = state(self.model), [type(module) for module in self.model]
        try:
            bnlab.convert(self.model, nn.Linear)
        except UsageError:
            assert agree(state(self.model), before)
            assert [type(module) for module in self.model] == kinds

    @rule(
        action=st.sampled_from(["check", "recalibrate", "layerwise", "convert", "fold"]),
        call=st.integers(1, 12),
        error=st.sampled_from([RuntimeError, KeyboardInterrupt]),
    )
    def interrupt(self, action, call, error):
        """Nothing has changed behind an action that stops at some call of forward."""
        calls = itertools.count(1)

        def stop(*_):
            if next(calls) == call:
                raise error("stop")

        actions = {
            "check": lambda: bnlab.check(self.model, data=self.batches, metric=lambda *_: 1.0),
            "recalibrate": lambda: bnlab.recalibrate(self.model, self.batches),
            "layerwise": lambda: bnlab.recalibrate(self.model, self.batches, layerwise=True),
            "convert": lambda: bnlab.convert(self.model, KINDS[1], fuse=True, example=self.batches[0]),
            "fold": lambda: bnlab.fold(self.model, self.batches[0]),
        }
        hook = self.model[0].register_forward_pre_hook(stop)
        before = trace_of(self.model)
        try:
            result = actions[action]()
        except (UsageError, RuntimeError, KeyboardInterrupt):
            result = None
        if result is not None and action not in ("check", "fold"):
            result.undo()
        else:
            assert differences(before, trace_of(self.model)) == []
        hook.remove()

    @rule()
    def train_on_a_batch(self):
        fixed = {path: self.holds_buffers(path) for path in LAYERS}
        before = state(self.model)
        self.model.train()(self.batches[0])
        for path in LAYERS:
            has_changed = not torch.equal(
                before[f"{path}.running_mean"], self.model.state_dict()[f"{path}.running_mean"]
            )
            assert not (has_changed and fixed[path])
        self.receipts.clear()  # training builds on what was done: there is no way back any more

    def holds_buffers(self, path):
        layer = self.model.get_submodule(path)
        frozen = isinstance(layer, bnlab.nn.FrozenBatchNorm1d.__mro__[1])
        return not layer.track_running_stats or (frozen and not layer.moves_statistics)

    @rule(training=st.booleans())
    def change_mode(self, training):
        self.model.train(training)

    @precondition(lambda self: self.receipts)
    @rule()
    def undo_the_last(self):
        receipt, (before, kinds, grads, switches) = self.receipts.pop()
        receipt.undo()
        assert agree(state(self.model), before)
        assert [type(module) for module in self.model] == kinds
        assert self.grads() == grads
        assert self.switches() == switches

    @precondition(lambda self: len(self.receipts) > 1)
    @rule()
    def undo_out_of_order_or_not_at_all(self):
        """An earlier receipt may refuse; then nothing has changed. Or nothing stood in its way; then it is done."""
        receipt, _ = self.receipts[0]
        before, kinds = state(self.model), [type(module) for module in self.model]
        try:
            receipt.undo()
        except UsageError:
            assert agree(state(self.model), before)
            assert [type(module) for module in self.model] == kinds
        else:
            self.receipts.clear()

    @rule()
    def copy_it(self):
        """A deep copy is a model in its own right; the receipts belong to the old one."""
        self.model = copy.deepcopy(self.model)
        self.objects = self.tensors()
        self.receipts.clear()

    @invariant()
    def eval_mode_follows_the_formula(self):
        if hasattr(self, "model"):
            copied = copy.deepcopy(self.model).eval()
            with torch.no_grad():
                assert_close(copied(self.batches[1]), expected_output(copied, self.batches[1]))

    @invariant()
    def names_and_settings_are_kept(self):
        if hasattr(self, "model"):
            assert set(self.model.state_dict()) == self.keys
            assert {path: self.model.get_submodule(path).momentum for path in LAYERS} == self.momenta

    @invariant()
    def tensors_are_the_same_objects(self):
        if hasattr(self, "model"):
            for name, tensor in self.tensors().items():
                assert tensor is self.objects[name], name


Remedies.TestCase.settings = settings(max_examples=40, stateful_step_count=12, deadline=None)
TestRemedies = Remedies.TestCase
