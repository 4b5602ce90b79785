import pytest


@pytest.mark.parametrize(
    ("option", "text", "commands"),
    [
        ("--model", "a checkpoint is loaded into it", [("check",), ("repair",), ("fold",)]),
        ("--data", "Data that the model will see", [("check",), ("repair",)]),
        ("--train-data", "Data that the model was trained on", [("check",), ("repair",)]),
        ("--metric", "higher is better", [("check",), ("repair",)]),
        ("--example", "to see what the model executes", [("check",), ("fold",)]),
        ("--loss", "loss(model, batch) -> scalar", [("check",), ("repair",)]),
        ("--forward", "forward(model, batch) -> output", [("check",), ("repair",), ("fold",)]),
        ("--device", "such as cuda, cuda:1 or mps", [("check",), ("repair",), ("fold",)]),
        ("--output", "Write here instead of to stdout", [("check",), ("report",), ("lab", "run"), ("lab", "report")]),
        ("--level", "make the exit code 1", [("check",), ("repair",)]),
    ],
)
def test_an_option_is_described_alike_wherever_it_is(bnlab_command, option, text, commands):
    for command in commands:
        code, out, _ = bnlab_command(*command, "--help")
        words = " ".join(out.replace("│", " ").split())
        assert code == 0
        assert text in words.partition(f" {option} ")[2]
