"""What a recorder makes of training loops: each loop is an ordinary one of torch."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnlab
from bnlab.watching.recorder import Recorder


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.block = nn.Sequential(nn.BatchNorm1d(8), nn.ReLU())
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(self.block, self.first(x), use_reentrant=self.use_reentrant)


def network(layer=nn.BatchNorm1d):
    return nn.Sequential(nn.Linear(4, 8), layer(8), nn.ReLU(), nn.Linear(8, 2))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01)


@pytest.fixture
def record():
    recorders = []

    def start(model, optimizer=None, **options):
        settings = {"scaler": None, "every": 100, "on_step": lambda: None, "on_sample": lambda *_: None, **options}
        recorder = Recorder(model, optimizer, **settings)
        recorders.append(recorder)
        recorder.install()
        return recorder

    yield start
    for recorder in recorders:
        recorder.remove()


def train(model, optimizer, steps=1, x=None):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(32, 4) if x is None else x).square().mean().backward()
        optimizer.step()


def steps_of(recorder, layer=0):
    return [*recorder.layers[layer].evidence.steps]


def test_an_ordinary_step_updates_once_and_uses_one_backward_pass(record):
    model = network()
    recorder = record(model)
    train(model, sgd(model), steps=3)
    for step in steps_of(recorder):
        assert (step.updates, step.backwards, step.recomputed, step.repeated, step.outside) == (1, 1, 0, 0, 0)
        assert (step.training, step.count, step.inputs_train) == (True, 32, True)
    evidence = recorder.layers[0].evidence
    assert evidence.has_parameters_before
    assert all(step.trains for step in evidence.steps)
    assert evidence.began_training
    assert evidence.windows == recorder.step == 3


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("layer", [nn.BatchNorm1d, bnlab.nn.BatchNorm1d])
def test_recomputation_is_no_second_forward_pass(record, use_reentrant, layer):
    model = Checkpointed(use_reentrant)
    model.block[0] = layer(8)
    recorder = record(model)
    train(model, sgd(model), steps=3)
    updates = int(model.block[0].num_batches_tracked)
    assert updates == (6 if layer is nn.BatchNorm1d else 3)
    assert sum(step.updates + step.recomputed for step in steps_of(recorder)) == updates
    assert [step.updates for step in steps_of(recorder)] == [1, 1, 1]
    assert all(step.outside == step.repeated == 0 for step in steps_of(recorder))


def test_accumulation_uses_several_backward_passes_and_siamese_passes_share_one(record):
    model = network()
    optimizer = sgd(model)
    recorder = record(model)
    for _ in range(4):
        model(torch.randn(32, 4)).square().mean().backward()
    optimizer.step()
    (model(torch.randn(32, 4)) - model(torch.randn(32, 4))).square().mean().backward()
    optimizer.step()
    assert [(step.updates, step.backwards) for step in steps_of(recorder)] == [(4, 4), (2, 1)]


def test_the_same_batch_twice_is_repeated(record):
    model = network()
    optimizer, x = sgd(model), torch.randn(32, 4)
    recorder = record(model)
    (model(x) + model(x)).square().mean().backward()
    optimizer.step()
    train(model, optimizer, x=x)
    assert [(step.updates, step.repeated) for step in steps_of(recorder)] == [(1, 1), (1, 0)]


def test_forward_passes_that_no_step_uses_are_counted_where_they_happened(record):
    model = network()
    optimizer = sgd(model)
    recorder = record(model)
    train(model, optimizer, steps=2)
    model(torch.randn(32, 4))
    train(model, optimizer)
    with torch.no_grad():
        model(torch.randn(32, 4))
        model(torch.randn(32, 4))
    train(model, optimizer, steps=2)
    assert [step.without_step for step in steps_of(recorder)] == [0, 0, 1, 0, 0]
    assert [step.without_gradients for step in steps_of(recorder)] == [0, 0, 0, 2, 0]
    evidence = recorder.layers[0].evidence
    assert evidence.windows_outside == 2
    assert evidence.first_outside.step == 2


def test_what_no_step_follows_is_counted_at_the_end(record):
    model = network()
    recorder = record(model)
    train(model, sgd(model), steps=2)
    with torch.no_grad():
        model(torch.randn(32, 4))
    recorder.end()
    evidence = recorder.layers[0].evidence
    assert (evidence.first_outside.step, evidence.first_outside.without_gradients) == (2, 1)
    assert evidence.is_over


def test_a_forward_pass_in_eval_mode_between_steps_does_not_count(record):
    model = network()
    optimizer = sgd(model)
    recorder = record(model)
    train(model, optimizer)
    model.eval()
    with torch.no_grad():
        model(torch.randn(32, 4))
    model.train()
    train(model, optimizer)
    assert [step.training for step in steps_of(recorder)] == [True, True]
    assert not any(step.outside for step in steps_of(recorder))


def test_gradients_of_both_modes_count_as_train_mode(record):
    model = network()
    optimizer = sgd(model)
    recorder = record(model)
    x = torch.randn(32, 4, requires_grad=True)
    model.eval()
    torch.autograd.grad(model(x).sum(), x)
    model.train()
    train(model, optimizer)
    assert [step.training for step in steps_of(recorder)] == [True]


def test_a_frozen_layer_says_so(record):
    model = network()
    optimizer = sgd(model)
    recorder = record(model)
    train(model, optimizer)
    model[1].eval()
    train(model, optimizer)
    model.eval()
    train(model, optimizer)
    assert [(step.training, step.frozen) for step in steps_of(recorder)] == [
        (True, False),
        (False, True),
        (False, False),
    ]


class Gan(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = network()
        self.critic = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


def test_two_optimizers_that_alternate_have_steps_of_their_own(record):
    model = Gan()
    of_generator, of_critic = sgd(model.generator), sgd(model.critic)
    recorder = record(model)
    for _ in range(4):
        fake = model.generator(torch.randn(32, 4))
        of_critic.zero_grad()
        model.critic(torch.randn(32, 2)).mean().backward()
        model.critic(fake.detach()).mean().backward()
        of_critic.step()
        of_generator.zero_grad()
        model.critic(fake).mean().backward()
        of_generator.step()
    generator, critic = (watched.evidence for watched in recorder.layers)
    assert generator.windows == critic.windows == 4
    assert generator.others_step
    assert critic.others_step
    assert all(step.trains for evidence in (generator, critic) for step in evidence.steps)
    assert generator.windows_outside == critic.windows_outside == 0


def test_optimizers_that_step_together_make_one_step(record):
    model = network()
    optimizers = [sgd(model[0]), sgd(model[1]), sgd(model[3])]
    recorder = record(model)
    for _ in range(3):
        model(torch.randn(32, 4)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    evidence = recorder.layers[0].evidence
    assert recorder.step == 3
    assert [step.updates for step in evidence.steps if step.updates] == [1, 1, 1]
    assert all(step.trains for step in evidence.steps)


def test_an_optimizer_that_takes_over_continues_the_count(record):
    model = network()
    recorder = record(model)
    train(model, sgd(model[3]), steps=3)
    train(model, sgd(model), steps=2)
    assert recorder.step == 5
    assert [step.step for step in steps_of(recorder)] == [0, 1, 2, 3, 4]
    assert [step.updates for step in steps_of(recorder)] == [1, 1, 1, 1, 1]


def test_optimizers_that_step_together_are_no_adversaries_in_any_order(record):
    model = network()
    head, rest = sgd(model[3]), torch.optim.SGD([*model[0].parameters(), *model[1].parameters()], lr=0.01)
    recorder = record(model)
    for _ in range(3):
        for _ in range(2):
            model(torch.randn(32, 4)).square().mean().backward()
        head.step()
        rest.step()
    evidence = recorder.layers[0].evidence
    assert not evidence.others_step
    assert [(step.updates, step.backwards) for step in evidence.steps] == [(2, 2)] * 3


def test_a_pass_outside_training_on_the_batch_of_a_step_is_no_repetition(record):
    model = network()
    optimizer = sgd(model)
    recorder = record(model, optimizer)
    x = torch.randn(32, 4)
    model(x)  # without a backward pass
    model(x).sum().backward()
    optimizer.step()
    model(x).sum().backward()
    with torch.no_grad():
        model(x)
    optimizer.step()
    model.eval()
    model(x)
    model.train()
    model(x).sum().backward()
    optimizer.step()
    assert [(step.updates, step.repeated, step.repeated_outside) for step in steps_of(recorder)] == [
        (1, 0, 1),
        (1, 0, 1),
        (1, 0, 0),
    ]


def test_layers_that_replace_watched_ones_are_watched_from_the_next_step_on(record):
    model = network()
    optimizer = sgd(model)
    recorder = record(model, optimizer)
    train(model, optimizer, steps=3)
    first = model[1]
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    model(torch.randn(32, 4))
    model[1] = torch.nn.BatchNorm1d(8)
    train(model, optimizer, steps=4)
    recorder.end()
    evidence = recorder.layers[0].evidence
    assert evidence.windows_outside == 0
    assert [step.updates for step in evidence.steps] == [1, 1, 1, 0, 1, 1, 1]
    assert not first._forward_hooks
    recorder.remove()
    assert not model[1]._forward_hooks


def test_a_lazy_layer_is_new(record):
    model = torch.nn.Sequential(torch.nn.LazyLinear(8), torch.nn.LazyBatchNorm1d(), torch.nn.LazyLinear(2))
    recorder = record(model)
    y = model(torch.randn(32, 4))
    optimizer = sgd(model)
    y.sum().backward()
    optimizer.step()
    train(model, optimizer)
    evidence = recorder.layers[0].evidence
    assert evidence.is_fresh
    assert evidence.channels == 8
    assert [step.updates for step in evidence.steps] == [1, 1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_pass_is_recorded_and_the_program_has_nothing_of_the_watch(record):
    model = network()
    optimizer = sgd(model)
    x = torch.randn(32, 4)
    plain = str(torch.jit.trace(copy.deepcopy(model), x, check_trace=False).inlined_graph)
    recorder = record(model, optimizer)
    traced = str(torch.jit.trace(model, x, check_trace=False).inlined_graph)
    assert traced.count("aten::") == plain.count("aten::")
    train(model, optimizer)
    assert recorder.layers[0].evidence.windows == 1


def test_statistics_that_are_loaded_into_a_compiled_model_are_no_updates(record):
    model = network()
    compiled = torch.compile(model, backend="eager")
    optimizer = sgd(model)
    recorder = record(compiled, optimizer)
    train(compiled, optimizer, steps=3)
    averaged = copy.deepcopy(model.state_dict())
    averaged["1.num_batches_tracked"] += 50
    model.load_state_dict(averaged)
    compiled.eval()
    with torch.no_grad():
        compiled(torch.randn(32, 4))
    compiled.train()
    train(compiled, optimizer, steps=3)
    recorder.end()
    assert recorder.layers[0].evidence.windows_outside == 0


def test_parameters_that_do_not_train_and_those_that_change_by_other_means(record):
    model = network()
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD([*model[3].parameters()], lr=0.01)
    recorder = record(model, optimizer)
    train(model, optimizer, steps=2)
    assert [step.trains for step in steps_of(recorder)] == [False, False]
    model[1].weight.data.mul_(0.9)
    train(model, optimizer)
    assert [step.trains for step in steps_of(recorder)] == [False, False, True]


def test_a_batch_that_is_not_finite_is_noticed_at_its_step(record):
    plain, safe = network(), network(bnlab.nn.BatchNorm1d)
    for model in (plain, safe):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        recorder = record(model, optimizer)
        train(model, optimizer, steps=2)
        train(model, optimizer, x=torch.full((32, 4), float("inf")))
        evidence = recorder.layers[0].evidence
        if model is plain:
            assert (evidence.nonfinite_step, evidence.kept_out_step) == (2, None)
        else:
            assert (evidence.nonfinite_step, evidence.kept_out_step, evidence.kept_out) == (None, 2, 1)
        recorder.remove()


def test_statistics_that_were_not_finite_before_are_no_event(record):
    model = network()
    model[1].running_mean[0] = float("nan")
    recorder = record(model)
    train(model, sgd(model))
    assert recorder.layers[0].evidence.nonfinite_step is None


def test_a_step_that_the_scaler_skips_is_a_step(record):
    model = network()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    recorder = record(model, optimizer, scaler=scaler)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(32, 4)).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert [step.skipped for step in steps_of(recorder)] == [False, True, False]
    assert all(step.moves for step in steps_of(recorder))


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models_are_watched_by_their_counters(record, in_place):
    model = network()
    called = model if in_place else torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
    optimizer = sgd(model)
    recorder = record(called, optimizer)
    train(called, optimizer, steps=2)
    model.eval()
    train(called, optimizer)
    steps = steps_of(recorder)
    assert [step.updates for step in steps] == [1, 1, 0]
    if not in_place:
        assert [step.training for step in steps] == [True, True, False]
    assert all(step.inputs_train is None for step in steps)


def test_samples_are_taken_at_two_of_every_steps(record):
    model = network()
    sampled = []
    recorder = record(model, every=4, on_sample=lambda watched, sample: sampled.append((watched, sample.step)))
    train(model, sgd(model), steps=10)
    assert sampled == [(recorder.layers[0], step) for step in (1, 5, 9)]
    assert [sample.step for sample in recorder.layers[0].evidence.samples] == [1, 5, 9]


def test_removing_leaves_no_hook_and_a_second_time_does_nothing(record):
    model = network()
    recorder = record(model)
    recorder.remove()
    recorder.remove()
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    train(model, sgd(model))
    assert recorder.step == 0
