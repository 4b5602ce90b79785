"""What holds for every BN layer of bnlab when a tool replaces, stacks, fills or moves its tensors."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import distributed, nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.testing import assert_close

import bnlab
from bnlab.errors import UsageError

KINDS = [bnlab.nn.BatchNorm2d, bnlab.nn.FrozenBatchNorm2d, bnlab.nn.GhostBatchNorm2d, bnlab.nn.BatchRenorm2d]
kinds = pytest.mark.parametrize("kind", KINDS)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def trained(kind, device, training=True, **options):
    layer = kind(3, **options).train(training).requires_grad_(True)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3))
        layer.bias.copy_(torch.randn(3))
        layer.running_mean.copy_(torch.randn(3))
        layer.running_var.copy_(0.5 + torch.rand(3))
    return layer.to(device)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def pruned(layer):
    prune.custom_from_mask(layer, "weight", torch.tensor([1.0, 0.0, 1.0], device=layer.weight.device))
    return layer.weight_orig


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer.parametrizations.weight.original


def weight_normed(layer):
    parametrizations.weight_norm(layer)
    return layer.parametrizations.weight.original1


def weight_normed_by_hooks(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecates it, and models still use it
        weight_norm(layer)
    return layer.weight_v


def adapted(layer):
    """Replace the parameters by tensors that depend on others, as MAML does for its inner step."""
    leaf = layer.weight
    bias = layer.bias * 1
    del layer.weight, layer.bias
    layer.weight, layer.bias = 3 * leaf, bias
    return leaf


def replica(layer):
    """Replace the parameters by tensors, as torch.nn.parallel.replicate does for every device."""
    leaf = layer.weight
    tensors = leaf * 1, layer.bias * 1
    layer._parameters = {}
    layer.weight, layer.bias = tensors
    return leaf


TOOLS = [pruned, parametrized, weight_normed, weight_normed_by_hooks, adapted, replica]


@kinds
@modes
@pytest.mark.parametrize("tool", TOOLS)
def test_replaced_parameters_are_used(kind, training, tool, device):
    layer, x = trained(kind, device, training), torch.randn(6, 3, 4, 4).to(device)
    plain, leaf = copy.deepcopy(layer), tool(layer)
    y = layer(x)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
    assert_close(y, plain(x), rtol=0, atol=0)
    assert_close(layer.running_var, plain.running_var, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
    assert gradient.abs().sum() > 0
    assert "backend=" in repr(layer)


@kinds
def test_replaced_buffers_are_used_and_updated(kind, device):
    layer, x = trained(kind, device), torch.randn(6, 3, 4, 4).to(device)
    if kind is bnlab.nn.FrozenBatchNorm2d:
        layer.moves_statistics = True
    plain = copy.deepcopy(layer)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        value = getattr(layer, name).clone()
        delattr(layer, name)
        setattr(layer, name, value)
    assert_close(layer(x), plain(x), rtol=0, atol=0)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert_close(getattr(layer, name), getattr(plain, name), rtol=0, atol=0)
    assert_close(layer.eval()(x), plain.eval()(x), rtol=0, atol=0)


@kinds
@modes
def test_stacked_models_run_under_vmap(kind, training, device):
    models, x = [trained(kind, device, training) for _ in range(3)], torch.randn(3, 6, 3, 4, 4).to(device)
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0])
    y = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)))(parameters, buffers, x)
    for index, model in enumerate(models):
        assert_close(y[index], model(x[index]))
        for name, buffer in model.named_buffers():
            assert_close(buffers[name][index], buffer)


@kinds
@modes
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.func's own use of torch.jit
def test_stacked_models_are_differentiated_under_vmap(kind, training, device):
    models, x = [trained(kind, device, training) for _ in range(3)], torch.randn(3, 6, 3, 4, 4).to(device)
    parameters, buffers = stack_module_state(models)
    base, tangents = copy.deepcopy(models[0]), torch.randn_like(x)

    def output(p, b, x):
        own = {name: buffer.clone() for name, buffer in b.items()}
        return functional_call(base, (p, own), (x,))

    def all_derivatives(p, b, x, tangent):
        def alone(x):
            return output(p, b, x)

        return (
            grad(lambda x: alone(x).square().sum())(x),
            jvp(alone, (x,), (tangent,))[1],
            jacrev(lambda x: alone(x).square().sum((0, 2, 3)))(x),
        )

    gradients, directions, jacobians = vmap(all_derivatives)(parameters, buffers, x, tangents)
    for index, model in enumerate(models):
        leaf = x[index].clone().requires_grad_()
        y = copy.deepcopy(model)(leaf)
        (expected,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        assert_close(gradients[index], expected, rtol=1e-4, atol=1e-4)
        assert_close(jacobians[index].sum(0), expected, rtol=1e-4, atol=1e-4)
        weights = torch.randn_like(y)
        (pulled,) = torch.autograd.grad(y, leaf, weights)
        assert_close((directions[index] * weights).sum(), (pulled * tangents[index]).sum(), rtol=1e-4, atol=1e-4)


def test_running_statistics_that_models_share_are_refused_under_vmap(device):
    layer, x = trained(bnlab.nn.BatchNorm2d, device), torch.randn(2, 6, 3, 4, 4).to(device)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(UsageError, match=r"be stacked to be updated under vmap, got buffers of shape \(3,\)"):
        vmap(layer)(x)
    assert_close(layer.state_dict(), before, rtol=0, atol=0)
    layer.track_running_stats = False
    assert_close(vmap(layer)(x)[1], layer(x[1]))


@kinds
def test_every_buffer_is_in_the_state_dict(kind, device):
    """Loaders fill the other buffers with what happens to lie in memory, and DDP broadcasts all buffers."""
    layer = trained(kind, device)
    assert {name for name, _ in layer.named_buffers()} <= layer.state_dict().keys()
    assert layer.skipped_batches == 0


@kinds
def test_a_layer_without_values_gets_them_from_a_loader(kind, device):
    expected, x = trained(kind, device), torch.randn(6, 3, 4, 4).to(device)
    with torch.device("meta"):
        assigned, emptied, by_name = kind(3), kind(3), kind(3)
    assigned.load_state_dict(copy.deepcopy(expected.state_dict()), assign=True)
    emptied.to_empty(device=device).load_state_dict(expected.state_dict())
    for name, tensor in expected.state_dict().items():  # as accelerate does, around every method of a module
        own = by_name._parameters if name in by_name._parameters else by_name._buffers
        own[name] = nn.Parameter(tensor.clone()) if own is by_name._parameters else tensor.clone()
    y = expected(x)
    for layer in (assigned, emptied, by_name):
        assert_close(layer(x), y, rtol=0, atol=0)
        layer(torch.full_like(x, float("nan")))
        assert kind is bnlab.nn.FrozenBatchNorm2d or layer.skipped_batches == 1
    filled = trained(kind, device)
    filled.skipped_batches.fill_(3)
    assert filled.to(torch.float64).skipped_batches == 3
    assert filled.to("meta").to_empty(device=device).skipped_batches == 0


@kinds
def test_pickles_in_which_the_own_tensors_are_buffers_load(kind, device):
    layer, x = trained(kind, device), torch.randn(6, 3, 4, 4).to(device)
    state = layer.__getstate__() if kind is not bnlab.nn.BatchNorm2d else dict(vars(layer))
    old = {name: value for name, value in state.items() if name not in type(layer)._own_tensors}
    own = {name: state[name].clone() for name in type(layer)._own_tensors}
    own["skipped_batches"].fill_(2)
    old["_buffers"] = {**state["_buffers"], **own}
    old["_non_persistent_buffers_set"] = {*own}
    loaded = kind.__new__(kind)
    loaded.__setstate__(pickle.loads(pickle.dumps(old)))
    assert loaded.skipped_batches == 2
    assert (
        loaded.state_dict().keys()
        == layer.state_dict().keys()
        == dict(loaded.named_buffers()).keys() | {"weight", "bias"}
    )
    assert_close(loaded(x), layer(x), rtol=0, atol=0)
    assert pickle.loads(pickle.dumps(loaded)).skipped_batches == copy.deepcopy(loaded).skipped_batches == 2


@pytest.mark.parametrize("kind", [bnlab.nn.BatchNorm2d, bnlab.nn.BatchRenorm2d])
def test_a_compiled_layer_counts_skipped_batches(kind, device):
    layer = trained(kind, device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 3, 4, 4).to(device)
    for batch in (x, x * float("nan"), x, x * float("inf")):
        compiled(batch)
    assert (layer.skipped_batches, layer.num_batches_tracked) == (2, 2)
    if kind is bnlab.nn.BatchRenorm2d:
        layer.r_max, layer.d_max = 1.0, 0.0
        plain = trained(bnlab.nn.BatchNorm2d, device)
        plain.load_state_dict(layer.state_dict())
        assert_close(compiled(5 + x), plain(5 + x))
    torch._dynamo.reset()


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.cpu_only("a process group of gloo")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("original", [True, False])
def test_flat_parameters_of_fsdp(original, device):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    net = nn.Sequential(nn.Conv2d(3, 3, 1), trained(bnlab.nn.BatchNorm2d, device, activation="relu"))
    plain, x = copy.deepcopy(net), torch.randn(6, 3, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the CPU as a device
        sharded = fsdp.FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=original)
        y = sharded(x)
        y.square().sum().backward()
    assert_close(y, plain(x), rtol=0, atol=0)
    assert_close(net[1].running_var, plain[1].running_var, rtol=0, atol=0)


@pytest.mark.cpu_only("a process group of gloo")
@pytest.mark.usefixtures("process_group")
def test_ddp_broadcasts_statistics_but_no_count_of_skipped_batches(device):
    net = nn.Sequential(nn.Conv2d(3, 3, 1), trained(bnlab.nn.BatchNorm2d, device))
    wrapped, x = nn.parallel.DistributedDataParallel(net), torch.randn(6, 3, 4, 4)
    wrapped(x * float("nan"))
    wrapped(x)
    assert (net[1].skipped_batches, net[1].num_batches_tracked) == (1, 1)
    assert not any(buffer is net[1].skipped_batches for buffer in wrapped.modules_buffers)
    assert any(buffer is net[1].running_mean for buffer in wrapped.modules_buffers)
