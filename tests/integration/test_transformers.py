"""transformers: models that take keywords and return an object, with batches that are dicts."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="make test-integration installs transformers", exc_type=ImportError
)

from tests.integration.case import SAMPLES, Case, images, keywords  # noqa: E402
from tests.integration.cells import CELLS, judge, run_lines  # noqa: E402


def classifier(name, **settings):
    def build():
        config = getattr(transformers, f"{name}Config")(num_labels=10, **settings)
        return getattr(transformers, f"{name}ForImageClassification")(config)

    return Case(
        name,
        build,
        lambda: [{"pixel_values": batch} for batch in images(SAMPLES, 3, settings.get("image_size", 64), 64)],
        keywords("pixel_values"),
        label=lambda batch, output: {**batch, "labels": output.logits.argmax(1)},
    )


def segformer():
    config = transformers.SegformerConfig(
        num_labels=4, hidden_sizes=[8, 16, 24, 32], decoder_hidden_size=32, num_attention_heads=[1, 1, 2, 2]
    )
    return transformers.SegformerForSemanticSegmentation(config)


def conformer():
    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16, 16),
        conv_stride=(5, 4), conv_kernel=(10, 8), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        apply_spec_augment=False, classifier_proj_size=16, num_labels=5,
    )  # fmt: skip
    model = transformers.Wav2Vec2ConformerForSequenceClassification(config)
    model.freeze_feature_encoder()
    return model


def patchtst():
    config = transformers.PatchTSTConfig(
        num_input_channels=3, context_length=64, patch_length=8, patch_stride=8, d_model=16, num_attention_heads=2,
        ffn_dim=32, num_hidden_layers=2, prediction_length=8, norm_type="batchnorm",
    )  # fmt: skip
    return transformers.PatchTSTForPrediction(config)


def sound():
    return [{"input_values": batch.flatten(1)} for batch in images(SAMPLES, 1, 1, 4000)]


CASES = [
    classifier("ResNet", embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1], layer_type="basic"),
    classifier("RegNet", embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1], groups_width=16),
    classifier("MobileNetV1", depth_multiplier=0.25),
    classifier("MobileNetV2", depth_multiplier=0.35),
    classifier("EfficientNet", width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=640),
    classifier(
        "Levit",
        image_size=64,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1],
        key_dim=[16, 16, 16],
    ),
    Case(
        "Segformer",
        segformer,
        lambda: [{"pixel_values": batch} for batch in images()],
        keywords("pixel_values"),
        label=lambda batch, output: {
            **batch,
            "labels": torch.nn.functional.interpolate(output.logits, scale_factor=4).argmax(1),
        },
    ),
    Case(
        "Wav2Vec2-Conformer",
        conformer,
        sound,
        keywords("input_values"),
        label=lambda batch, output: {**batch, "labels": output.logits.argmax(1)},
    ),
    Case(
        "PatchTST",
        patchtst,
        lambda: [
            {"past_values": batch.flatten(2).transpose(1, 2), "future_values": torch.zeros(SAMPLES, 8, 3)}
            for batch in images(SAMPLES, 3, 1, 64)
        ],
        keywords("past_values"),
    ),
]


LINES = """
model = transformers.ResNetForImageClassification(transformers.ResNetConfig(depths=[1, 1, 1, 1], num_labels=10))
bnlab.recalibrate(model, loader)  # batches as the Trainer has them: {"pixel_values": ..., "labels": ...}
print(bnlab.fold(model, next(iter(loader))))
"""


@pytest.mark.parametrize("action", CELLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cell(case, action, record_property):
    judge("transformers", case, action, record_property)


def test_lines(record_property):
    namespace = run_lines("transformers", LINES, record_property, loader=CASES[0].data, transformers=transformers)
    assert namespace["model"].resnet.embedder.embedder.normalization.num_batches_tracked > 0
