import torch
from tests.samples import rewrite_zip, save

from bnlab.observe.files.content import open_content
from bnlab.observe.files.zip_archive import read_archive
from bnlab.observe.files.zipped_pickle import KNOWN, is_big_endian, pickle_root, read_zipped_pickle


def test_the_pickle_of_an_archive_leads_to_its_members(tmp_path):
    path = save({"a": torch.arange(3)}, tmp_path / "a.pt")
    archive = read_archive(open_content(path))
    root = next(iter(archive.members)).partition("/")[0] + "/"
    assert pickle_root(archive) == root
    tree = read_zipped_pickle(archive, root)
    assert tree["a"].read().tolist() == [0, 1, 2]


def test_the_byte_order_is_little_unless_the_archive_says_otherwise(tmp_path):
    path = save({"a": torch.arange(3)}, tmp_path / "a.pt")
    archive = read_archive(open_content(path))
    root = next(iter(archive.members)).partition("/")[0] + "/"
    assert not is_big_endian(archive, root)
    rewrite_zip(path, lambda name, data: b"big" if name.endswith("byteorder") else data)
    assert is_big_endian(read_archive(open_content(path)), root)
    rewrite_zip(path, lambda name, data: None if name.endswith("byteorder") else data)
    assert not is_big_endian(read_archive(open_content(path)), root)


def test_no_name_is_in_two_families():
    from bnlab.observe.files.pickle_globals import PLAIN
    from bnlab.observe.files.torch_globals import TORCH

    assert not PLAIN.keys() & TORCH.keys()
    assert KNOWN.keys() >= PLAIN.keys() | TORCH.keys()
