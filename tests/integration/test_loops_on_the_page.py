"""The lines of docs/watch.md for each framework, run as they are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import bnlab

PAGE = (Path(__file__).parents[2] / "docs" / "watch.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
    pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning"),
]


def block_with(text):
    (block,) = [block for block in BLOCKS if text in block]
    return block


def test_lightning(tmp_path, monkeypatch, capsys):
    from tests.integration.test_loop_of_lightning import Classifier, data, lightning

    monkeypatch.chdir(tmp_path)
    names = {"lightning": lightning, "module": Classifier(), "loader": data(shuffle=True)}
    exec(compile(block_with("integrations.lightning"), "watch.md", "exec"), names)
    assert capsys.readouterr().out.endswith("()\n")
    assert names["trainer"].global_step == 8


def test_transformers(tmp_path, capsys):
    from tests.integration.test_loop_of_transformers import Classifier, Images, transformers

    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=1, per_device_train_batch_size=16, report_to=[], use_cpu=True, disable_tqdm=True
    )
    names = {"transformers": transformers, "model": Classifier(), "arguments": arguments, "dataset": Images()}
    exec(compile(block_with("integrations.transformers"), "watch.md", "exec"), names)
    assert capsys.readouterr().out.endswith("()\n")
    assert names["trainer"].state.global_step == 4


def test_accelerate(capsys):
    from tests.integration.test_loop_of_accelerate import accelerate, network, train
    from tests.integration.test_loop_of_transformers import Images

    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    loader = DataLoader([(item["pixel_values"], item["labels"]) for item in Images()], batch_size=16, shuffle=True)
    names = {
        "bnlab": bnlab, "accelerator": accelerator, "model": model, "loader": loader,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05),
        "train": lambda model, optimizer, loader: train(accelerator, model, optimizer, loader),
    }  # fmt: skip
    exec(compile(block_with("accelerator.prepare"), "watch.md", "exec"), names)
    assert capsys.readouterr().out.endswith("()\n")
    assert isinstance(names["model"], nn.Module)


def test_ultralytics(tmp_path, capsys, monkeypatch):
    pytest.importorskip("ultralytics", exc_type=ImportError)
    from tests.integration.test_loop_of_ultralytics import YOLO, BaseTrainer, write_images
    from ultralytics.utils import SETTINGS

    monkeypatch.setattr(BaseTrainer, "read_results_csv", lambda self: {})
    monkeypatch.setitem(SETTINGS, "runs_dir", str(tmp_path / "runs"))
    names = {"model": YOLO("yolov8n-cls.yaml", verbose=False), "data": str(write_images(tmp_path / "images"))}
    block = block_with("integrations.ultralytics").replace("epochs=2", "epochs=1, imgsz=64, workers=0, plots=False")
    exec(compile(block, "watch.md", "exec"), names)
    assert capsys.readouterr().out.endswith("()\n")
    assert names["callback"].watch.step > 0
