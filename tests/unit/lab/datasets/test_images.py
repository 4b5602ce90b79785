import pytest
import torch

from bnlab.lab.datasets.images import Images

IMAGES = Images(torch.arange(20, dtype=torch.uint8).view(5, 1, 2, 2), torch.tensor([4, 0, 1, 3, 2]), white=16)


def test_a_batch_is_floats_with_their_labels():
    images, labels = IMAGES.batch(torch.tensor([3, 0]))
    assert images.dtype == torch.float32
    assert images.tolist() == [[[[12 / 16, 13 / 16], [14 / 16, 15 / 16]]], [[[0.0, 1 / 16], [2 / 16, 3 / 16]]]]
    assert labels.tolist() == [3, 4]
    images, labels = IMAGES.batch()
    assert torch.equal(images * 16, IMAGES.pixels.float())
    assert torch.equal(labels, IMAGES.labels)


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_batches_hold_every_image_once_with_its_label(size):
    batches = IMAGES.batches(size)
    assert all(len(labels) == size for _, labels in batches[:-1])
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    order = labels.argsort()
    assert torch.equal(images[order], IMAGES.batch(IMAGES.labels.argsort())[0])
    again = torch.cat([labels for _, labels in IMAGES.batches(size)])
    assert torch.equal(labels, again)
