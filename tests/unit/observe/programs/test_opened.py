import copy

import pytest
import torch
from tests.programs import Mixed, Net, batches, program_of, trained
from torch import nn
from torch.fx import symbolic_trace

import bnlab
from bnlab.errors import UsageError
from bnlab.observe.programs.opened import is_program, opened, require_modules
from bnlab.observe.programs.shared_modules import ProgramBatchNorm

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:copyreg")


def values(program):
    return {name: tensor.detach().clone() for name, tensor in program.state_dict.items()}


@pytest.mark.parametrize(
    ("kind", "training", "decomposed"), [(Net, False, True), (Mixed, True, True), (Mixed, True, False)]
)
def test_an_opened_program_computes_and_updates_what_the_program_does(kind, decomposed, training):
    torch.manual_seed(0)
    program = program_of(kind().train(training))
    program = program.run_decompositions() if decomposed else program
    before = values(program)
    x = batches(1)[0]
    torch.manual_seed(1)
    expected, updated = program.module()(x), values(program)
    with torch.no_grad():
        for name, tensor in program.state_dict.items():
            tensor.copy_(before[name])
    torch.manual_seed(1)
    with opened(program) as other:
        assert torch.equal(other.model(x), expected)
    assert all(torch.equal(tensor, updated[name]) for name, tensor in program.state_dict.items())


def test_the_layers_are_modules_at_the_paths_of_the_model_and_share_its_tensors():
    program = program_of(Net())
    with opened(program) as other:
        kinds = {path: type(module) for path, module in other.model.named_modules()}
        assert (kinds["bn1"], kinds["block.0"]) == (ProgramBatchNorm, ProgramBatchNorm)
        assert (kinds["conv"], kinds["conv2"], kinds["fc"]) == (nn.Conv2d, nn.Conv2d, nn.Linear)
        assert other.model.bn1.running_mean is program.state_dict["bn1.running_mean"]
        assert other.model.train().training
        assert not other.model.eval().bn1.training
        assert (other.kind, other.is_program, other.batch_size) == ("ExportedProgram", True, 8)
        assert set(other.unknown) == {"BN212", "BN302"}
        assert "exported in train mode" in other.notes[1]


def test_what_an_eval_graph_cannot_show():
    with opened(program_of(Net().eval(), dynamic=True)) as other:
        assert set(other.unknown) == {"BN205", "BN212"}
        assert other.batch_size is None
        assert len(other.notes) == 1
    with opened(program_of(Mixed().eval())) as other:  # its dropout is an operator, which is off
        assert "BN205" not in other.unknown


def test_the_program_itself_and_its_graph_do_not_change():
    program = program_of(Net()).module()
    code, graph = program.code, str(program.graph)
    with opened(program) as other:
        assert other.model is not program
        other.model.eval()
    assert (program.code, str(program.graph)) == (code, graph)


def test_other_models_are_their_own():
    for model in (Net(), symbolic_trace(Net())):
        with opened(model) as other:
            assert other.model is model
            assert not other.is_program
        require_modules(model)


@pytest.mark.parametrize("fails", [True, False])
def test_a_program_inside_a_model_is_replaced_while_the_block_runs(fails):
    inner = program_of(Net()).module()
    model = nn.Sequential(inner, nn.BatchNorm1d(5))
    with opened(model) as other:
        assert other.model is model
        assert isinstance(model.get_submodule("0.block.0"), ProgramBatchNorm)
        assert other.notes[0].startswith("0: ")
        assert other.batch_size is None  # that of the model may be another one
        assert "BN302" in other.unknown
        if fails:
            with pytest.raises(NotImplementedError), opened(nn.Sequential(model)):
                raise NotImplementedError
    assert model[0] is inner
    with pytest.raises(UsageError, match=r"got the operators of a graph in 0 \(Sequential\)"):
        require_modules(model)


def test_an_unflattened_program_and_a_graph_without_tensors_are_refused():
    program = program_of(Net())
    for target in (torch.export.unflatten(program), program.graph_module):
        with pytest.raises(UsageError, match="Pass the ExportedProgram"), opened(target):
            pass


def test_what_is_no_module_is_refused():
    with pytest.raises(UsageError, match=r"model: it must be a torch.nn.Module, got dict\."), opened({}):
        pass
    with pytest.raises(UsageError, match=r"model: it must be a torch.nn.Module, got dict\."):
        bnlab.recalibrate({}, batches())


def test_a_program_is_recognised():
    program = program_of(Net())
    assert is_program(program)
    assert not is_program(program.module())
    for target in (program, program.module()):
        with pytest.raises(UsageError, match="Change the model before you export it"):
            require_modules(target)


def test_other_readers_of_running_statistics_keep_them_while_a_pass_withholds_them():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(x) * self.bn.running_var.sqrt().sum()

    with opened(program_of(Reader())) as other:
        other.model.bn.running_mean = other.model.bn.running_var = None
        assert other.model.eval()(batches(1)[0]).isfinite().all()


def test_a_forward_that_fails_prints_nothing(capsys):
    with opened(program_of(trained())) as other, pytest.raises(AssertionError, match="Guard failed"):
        other.model(batches(1, samples=3)[0])
    assert capsys.readouterr().err == ""


def test_a_copy_of_an_opened_program_runs():
    with opened(program_of(trained().eval())) as other:
        twin = copy.deepcopy(other.model)
        x = batches(1)[0]
        assert torch.equal(twin(x), other.model(x))
        assert twin.bn1.running_mean is not other.model.bn1.running_mean


def test_layers_of_bnlab_are_read_like_those_of_torch():
    model = bnlab.convert(trained(), bnlab.nn.BatchNorm2d).model
    with opened(program_of(model.eval())) as other:
        assert [path for path, m in other.model.named_modules() if isinstance(m, ProgramBatchNorm)] == [
            "bn1",
            "block.0",
        ]
