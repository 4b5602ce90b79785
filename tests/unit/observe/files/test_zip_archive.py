import struct
import zipfile

import pytest

from bnlab.errors import TooMuchWork
from bnlab.observe.files.budget import LIMITS, Budget
from bnlab.observe.files.content import open_content
from bnlab.observe.files.zip_archive import read_archive


def write(path, members, compression=zipfile.ZIP_STORED, comment=b""):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.comment = comment
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("comment", [b"", b"PK\x01\x02 a note"])
def test_members_read_as_zipfile_reads_them(tmp_path, compression, comment):
    members = {"a/x": b"one" * 1000, "a/empty": b"", "b/\u00e9": bytes(range(256))}
    archive = read_archive(open_content(write(tmp_path / "a.zip", members, compression, comment)))
    assert list(archive.members) == list(members)
    assert {name: archive.span(name).read() for name in members} == members
    assert archive.read("b/\u00e9", 256) == members["b/\u00e9"]
    with pytest.raises(ValueError, match="at most 255 are sensible"):
        archive.read("b/\u00e9", 255)


def test_a_stored_member_is_not_read_before_somebody_reads_it(tmp_path):
    content = open_content(write(tmp_path / "a.zip", {"a": bytes(1 << 20)}))
    span = read_archive(content).span("a")
    assert (span.source, span.size) == (content, 1 << 20)


def test_large_archives_have_records_of_their_own(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(70_000):
            archive.writestr(zipfile.ZipInfo(f"{number}"), b"")
    members = read_archive(open_content(path)).members
    assert len(members) == 70_000


def test_a_member_with_64_bit_sizes(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive, archive.open("a", "w", force_zip64=True) as member:
        member.write(b"text")
    assert read_archive(open_content(path)).span("a").read() == b"text"


def test_names_in_other_encodings(tmp_path):
    """Archives that were packed again on other systems name their members in code pages."""
    path = write(tmp_path / "a.zip", {"mod_le/a": b"one", "mod_le/b": b"two"})
    path.write_bytes(path.read_bytes().replace(b"mod_le", "mod\u00e8le".encode("cp437")))
    archive = read_archive(open_content(path))
    assert [archive.span(name).read() for name in archive.members] == [b"one", b"two"]


def test_a_checksum_that_is_wrong(tmp_path):
    path = write(tmp_path / "a.zip", {"a": b"some text"})
    path.write_bytes(path.read_bytes().replace(b"some text", b"some test"))
    archive = read_archive(open_content(path))
    with pytest.raises(ValueError, match="a has another checksum"):
        archive.check("a", archive.span("a"))


def entry(name, at, size):
    return struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, size, size, len(name), 0, 0, 0, 0, 0, at) + name


def end(count, size, start):
    return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, start, 0)


LOCAL = b"PK\3\4" + bytes(22) + struct.pack("<HH", 1, 0) + b"a" + b"data"


def crafted(path, *entries, local=LOCAL):
    directory = b"".join(entries)
    path.write_bytes(local + directory + end(len(entries), len(directory), len(local)))
    return open_content(path)


def test_the_crafted_archive_is_whole(tmp_path):
    assert read_archive(crafted(tmp_path / "a", entry(b"a", 0, 4))).span("a").read() == b"data"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry(b"a", 0, 4), entry(b"b", 0, 4)], "reaches into what lies behind it"),
        ([entry(b"a", 0, 4), entry(b"a", 0, 4)], "two members called a"),
        ([entry(b"a", 0, 5)], "reaches into what lies behind it"),
        ([entry(b"a", 1 << 30, 4)], "reaches into what lies behind it"),
        ([b"PK\1\3" + entry(b"a", 0, 4)[4:]], "something else than members"),
    ],
)
def test_a_directory_that_contradicts_itself(tmp_path, entries, message):
    with pytest.raises(ValueError, match=message):
        read_archive(crafted(tmp_path / "a", *entries))


def test_a_member_that_is_not_where_the_directory_says(tmp_path):
    archive = read_archive(crafted(tmp_path / "a", entry(b"a", 0, 4), local=bytes(64)))
    with pytest.raises(ValueError, match="is not where the directory"):
        archive.span("a")


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(tmp_path, compression):
    archive = read_archive(open_content(write(tmp_path / "a.zip", {"a": b"text"}, compression)))
    for read in (archive.span, lambda name: archive.head(name, 4)):
        with pytest.raises(ValueError, match="a is compressed in a way torch never does"):
            read("a")


def test_members_are_counted(tmp_path):
    content = open_content(write(tmp_path / "a.zip", {f"{n}": b"" for n in range(100)}))
    content.budget = Budget(limits={**LIMITS, "objects": 500})
    with pytest.raises(TooMuchWork):
        read_archive(content)
