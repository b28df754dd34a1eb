"""What a dataset holds is read, or counted with a reason: unreadable files, suffixes, folders.

Most tests validate a shard in this process, because the start of a worker takes a second.
"""

import errno
import json
import os
import tarfile

import corrupt_samples
import numpy as np
import pytest
from launches import PIXELS

from iomm.config import InputError
from iomm.engine import builders, cli
from iomm.engine.config import load_config
from iomm.engine.data.archive import LeftOut
from iomm.engine.data.index import build, ensure_index, find_index, load
from iomm.engine.data.patterns import absolute, expand, resolve
from iomm.engine.data.shards import Shards
from iomm.engine.data.validate import (
    CAPTION_JSON,
    CAPTION_TXT,
    DEFAULT_RULES,
    Rules,
    validate_shard,
)

JPEG = corrupt_samples.encode(corrupt_samples.smooth_image(40, 40, 1))
PNG = corrupt_samples.encode(corrupt_samples.smooth_image(40, 40, 2), "PNG")
REQUIRED = Rules(captions="required")


class Found:
    """The result of validating one shard."""

    def __init__(self, path, rules=DEFAULT_RULES, **options):
        chunks = list(validate_shard(path, rules, **options))
        self.records = np.concatenate([chunk.records for chunk in chunks])
        self.lines = [line for chunk in chunks for line in chunk.rejected]
        self.rejected = {line["key"]: line["reason"] for line in self.lines}
        self.left_out, self.notes = LeftOut(), {}
        for chunk in chunks:
            self.left_out.update_from(chunk.left_out)
            self.notes |= chunk.notes


def files(folder, *names, data=JPEG):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def tar(path, *members):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(corrupt_samples.tar_of(list(members)))
    return path


def counts(left_out):
    return {reason: num for reason, (num, _) in left_out.items()}


def test_unreadable_files_cost_only_their_samples(tmp_path):
    folder = files(tmp_path / "photos", *(f"{i}.jpg" for i in range(5)))
    (folder / "dangling.jpg").symlink_to("/nonexistent/x.jpg")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "device.jpg").symlink_to("/dev/zero")
    (folder / "0.txt").symlink_to("/nonexistent/0.txt")
    found = Found(folder)
    bad = ("dangling", "loop", "pipe", "device")
    assert len(found.records) == 5 and found.rejected == dict.fromkeys(bad, "unreadable")
    details = {line["key"]: line["detail"] for line in found.lines}
    assert details["dangling"] == "No such file or directory"
    assert details["pipe"] == "not a regular file" and found.notes["caption_unreadable"] == 1
    assert Found(folder, REQUIRED).rejected["0"] == "unreadable"


def test_unreadable_shards_are_counted_once_and_others_are_used(tmp_path):
    """With four processes two validate each shard."""
    good = tar(tmp_path / "tars" / "a.tar", *((f"{i}.jpg", JPEG) for i in range(3)))
    os.mkfifo(tmp_path / "tars" / "b.tar")
    gone = tmp_path / "gone.tar"
    (tmp_path / "tars" / "c.tar").symlink_to(gone)
    options = {"progress": False, "workers": 4}
    folder = ensure_index(tmp_path / "tars", tmp_path, **options)
    index = load(folder)
    assert len(index.records) == 3 and index.rejected == {"unreadable": 2}
    lines = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert {line["shard"]: line["detail"] for line in lines} == {
        str(tmp_path / "tars" / "b.tar"): "not a regular file",
        str(tmp_path / "tars" / "c.tar"): "No such file or directory",
    }
    assert find_index(tmp_path / "tars", tmp_path) == folder
    # The index is out of date as soon as the shard can be read.
    gone.write_bytes(good.read_bytes())
    assert find_index(tmp_path / "tars", tmp_path) is None
    assert len(load(ensure_index(tmp_path / "tars", tmp_path, **options)).records) == 6
    os.unlink(good)
    os.unlink(gone)
    with pytest.raises(
        InputError, match=r"no usable image\. Found 2 unreadable, e\.g\. .*b\.tar: not"
    ):
        build(tmp_path / "tars", tmp_path / "index", **options)


def test_unreadable_part_of_a_tar_costs_only_its_members(tmp_path, monkeypatch):
    """Two headers of a tar of 2 MiB are in bad sectors."""
    big = os.urandom(1 << 20)
    members = [(f"{i}.jpg", JPEG) for i in range(3)] + [("big.bin", big)]
    members += [("3.jpg", JPEG), ("big2.bin", big), ("4.jpg", JPEG)]
    path = tar(tmp_path / "a.tar", *members)
    with tarfile.open(path) as opened:
        places = {member.name: member.offset for member in opened}
    pread = os.pread

    def read(fd, num, offset):
        if offset < places["1.jpg"] + 4096 and places["1.jpg"] < offset + num:
            raise OSError(errno.EIO, "Input/output error")
        return pread(fd, num, offset)

    monkeypatch.setattr(os, "pread", read)
    found = Found(path)
    # The search for the next header skips 1 MiB at a time.
    assert len(found.records) == 3 and set(found.rejected) == {""}
    assert "cannot be read: Input/output error; reading resumes at" in found.lines[0]["detail"]
    monkeypatch.setattr(os, "pread", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "gone")))
    found = Found(path)
    assert not len(found.records) and found.rejected == {"": "unreadable"}


def test_images_are_taken_by_their_content_whatever_the_suffix(tmp_path):
    suffixes = "jpg JPE jfif jif pjpeg bmp gif tif avif heic jxl webp"
    folder = files(tmp_path, *(f"{suffix}.{suffix}" for suffix in suffixes.split()))
    files(tmp_path, "p.apng", data=PNG)
    assert len(Found(folder).records) == 13
    others = {"GIF": "gif", "BMP": "bmp", "TIFF": "tif", "ICO": "ico", "JPEG2000": "jp2"}
    for kind, suffix in others.items():
        image = corrupt_samples.smooth_image(40, 40)
        files(tmp_path, f"real.{suffix}.{suffix}", data=corrupt_samples.encode(image, kind))
    found = Found(folder)
    assert len(found.records) == 13
    assert found.rejected == {f"real.{suffix}": "unsupported" for suffix in others.values()}


def test_image_in_another_format_costs_no_image(tmp_path):
    folder = files(tmp_path, "0.jpg", "1.jpg")
    files(tmp_path, "0.gif", "0.jfif", "1.nef", data=b"GIF89a")
    files(tmp_path, "2.heic", "2.jpe", data=PNG)
    found = Found(folder)
    assert len(found.records) == 3 and not found.rejected
    assert counts(found.left_out) == {"of the form K.x.png beside K.jpg": 4}


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_masks_and_hidden_files_are_no_samples(tmp_path, kind):
    names = [f"a.b/{i}{rest}" for i in range(3) for rest in (".jpg", ".seg.png", ".depth.v2.png")]
    names += ["a.b/0.seg.json", "./photo.2020.01.jpg", "lone.seg.png", "v1.0/x.jpg"]
    hidden = [".cache/0.jpg", "@eaDir/0.jpg/SYNO.jpg", "__MACOSX/._0.jpg", "x/Thumbnails/a.jpg"]
    other = ["._0.jpg", "notes.md", "Makefile", "x.npy"]
    if kind == "tar":
        path = tar(tmp_path / "a.tar", *((name, JPEG) for name in names + hidden + other))
    else:
        path = files(tmp_path / "folder", *names, *hidden, *other)
    found = Found(path)
    assert len(found.records) == 6 and not found.rejected
    assert counts(found.left_out) == {
        "of the form K.x.png beside K.jpg": 7,
        "in a hidden or thumbnail folder": 4,
        "hidden files": 1,
        "named *.md": 1,
        "named *.npy": 1,
        "without a suffix": 1,
    }
    # Only one part of a shard reports it.
    assert not Found(path, part=1, num_parts=2).left_out


def test_linked_folders_are_read_once(tmp_path):
    files(tmp_path / "real", "0.jpg", "sub/1.jpg")
    folder = files(tmp_path / "photos", "2.jpg", "z/3.jpg")
    (folder / "more").symlink_to("../real")
    (folder / "again").symlink_to(tmp_path / "real")
    (folder / "a").symlink_to("z")
    (tmp_path / "real" / "up").symlink_to(folder)
    (folder / ".hidden").symlink_to("z")
    found = Found(folder)
    assert len(found.records) == 4 and not found.rejected
    # Of two links to a folder the first one counts, and a folder before any link to it.
    assert counts(found.left_out) == {
        "linked folders that were read already": 3,
        "in a hidden or thumbnail folder": 1,
    }
    index_dir = build(folder, tmp_path / "index", progress=False, workers=1)
    shards = Shards(index_dir)
    names = sorted(shards.name(k).partition(": ")[2] for k in range(4))
    assert names == ["2.jpg", "again/0.jpg", "again/sub/1.jpg", "z/3.jpg"]
    assert all(shards.image_bytes(k) == JPEG for k in range(4))


def test_unreadable_folders_are_counted(tmp_path, monkeypatch):
    folder = files(tmp_path / "photos", "0.jpg", "secret/1.jpg")
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == denied:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    denied = "secret"
    found = Found(folder)
    assert len(found.records) == 1 and found.left_out == {"unreadable folders": [1, "secret"]}
    denied = "photos"
    assert Found(folder).rejected == {"": "unreadable"}


def test_links_in_a_tar_are_counted(tmp_path):
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.LNKTYPE, "0.jpg"
    with tarfile.open(tmp_path / "a.tar", "w") as opened:
        opened.addfile(link)
    found = Found(tmp_path / "a.tar")
    assert found.left_out == {"links in a tar": [1, "link.jpg"]} and not len(found.records)


def facts(**fields):
    return json.dumps({"caption": "a dog", **fields}).encode()


BAD_SIDECARS = {
    "nan": ("json", facts(similarity=float("nan")), "not_json"),
    "long": ("json", facts(exif="x" * 70_000), "too_large"),
    "latin1": ("txt", b"B\xe4r", "not_utf8"),
    "nul": ("txt", b"a\0b", "nul"),
    "number": ("json", b'{"caption": 3}', "not_text"),
}


def test_bad_sidecars_cost_no_image_that_needs_no_caption(tmp_path):
    members = [("good.jpg", JPEG), ("good.txt", b"a cat")]
    for name, (suffix, data, _) in BAD_SIDECARS.items():
        members += [(f"{name}.jpg", JPEG), (f"{name}.{suffix}", data)]
    members += [("two.jpg", JPEG), ("two.txt", b"a"), ("two.TXT", b"b")]
    path = tar(tmp_path / "a.tar", *members)
    found = Found(path)
    assert len(found.records) == 7 and not found.rejected
    kinds = [*(kind for _, _, kind in BAD_SIDECARS.values()), "duplicate"]
    assert found.notes == {"no_caption": 6} | {f"caption_{kind}": 1 for kind in kinds}
    assert found.records["flags"].tolist() == [CAPTION_TXT, 0, 0, 0, 0, 0, 0]
    required = Found(path, REQUIRED)
    assert len(required.records) == 1
    assert required.rejected == {**dict.fromkeys(BAD_SIDECARS, "caption"), "two": "duplicate"}


def test_huge_sidecar_is_not_read(tmp_path):
    """Reading 4 GiB would exhaust the memory of a process."""
    folder = files(tmp_path, "0.jpg")
    with open(folder / "0.json", "wb") as file:
        file.truncate(1 << 32)
    assert Found(folder).notes == {"no_caption": 1, "caption_too_large": 1}


@pytest.mark.parametrize("text", [b"", b" \n", b"\xff"])
def test_json_replaces_a_txt_without_text(tmp_path, text):
    members = [("0.jpg", JPEG), ("0.txt", text), ("0.json", facts())]
    members += [("1.jpg", JPEG), ("1.txt", text), ("2.jpg", JPEG), ("2.txt", b"a cat")]
    members += [("2.json", b"{broken")]
    path = tar(tmp_path / "a.tar", *members)
    assert Found(path, REQUIRED).rejected == {"1": "caption"}
    index = build(path, tmp_path / "index", rules=REQUIRED, progress=False, workers=1)
    shards = Shards(index)
    assert [shards.caption(k) for k in range(2)] == ["a dog", "a cat"]
    assert shards.index.records["flags"].tolist() == [CAPTION_JSON, CAPTION_TXT]


def test_index_ends_with_a_line_on_what_was_not_used(tmp_path, capsys):
    folder = files(tmp_path / "photos", "0.jpg", ".thumbnails/0.jpg", "notes.md")
    files(folder, "1.gif", data=b"GIF89a")
    assert cli.main(["index", str(folder), "--out", str(tmp_path / "index")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "not used: 1 in a hidden or thumbnail folder, 1 named *.md, 1 rejected as unsupported"
    )
    # An index of an earlier version has no such counts.
    path = tmp_path / "index" / "index.json"
    header = json.loads(path.read_text())
    assert header.pop("left_out") and header.pop("unreadable") == []
    path.write_text(json.dumps(header))
    assert load(tmp_path / "index").left_out == {}


@pytest.mark.parametrize(
    "make, reasons",
    [
        (
            lambda p: tar(p / "part0" / "0.tar", ("0.jpg", JPEG)),
            ["1 named *.tar, e.g. {p}: part0/0.tar (a tar in a subfolder; name that folder"],
        ),
        (
            lambda p: files(p, "0.tar.gz", "1.tar.gz", "x.zip"),
            ["2 named *.gz, e.g. {p}: 0.tar.gz (compressed", "1 named *.zip"],
        ),
        (
            lambda p: files(p, "0.gif", "1.gif", "2.bmp", "3.jpg", "a/.b/c.jpg", data=b"GIF8 "),
            [
                "4 unsupported, e.g. {p}: 0: not a JPEG, PNG or WebP",
                "1 in a hidden or thumbnail folder, e.g. {p}: a/.b/c.jpg (name that folder itself",
            ],
        ),
        (
            lambda p: files(p, *(f"{i}.{s}" for i, s in enumerate("mmmkkkjjh"))),
            ["3 named *.k", "3 named *.m", "2 named *.j"],
        ),
        (
            lambda p: files(p, "a.tar", data=b"\x1f\x8b" * 600),
            ["1 bad_tar, e.g. {p}/a.tar: ", "gzip"],
        ),
        (lambda p: files(p, "a.tar", data=b"BZh9" * 300), ["compressed with bzip2"]),
        (lambda p: files(p, "a.tar", data=JPEG * 3), ["it is an image; give its folder"]),
    ],
)
def test_error_gives_the_most_frequent_reasons(tmp_path, make, reasons):
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)
    with pytest.raises(InputError) as error:
        build(folder, tmp_path / "index", progress=False, workers=1)
    places = [str(error.value).find(reason.format(p=folder)) for reason in reasons]
    assert -1 not in places and places == sorted(places), str(error.value)
    assert "\n" not in str(error.value) and "named *.h" not in str(error.value)


@pytest.mark.parametrize("url", ["s3://bucket/{0..3}.tar", "https://host/a.tar", "pipe:curl x"])
def test_urls_are_refused_by_name(url, tmp_path):
    with pytest.raises(InputError, match="is a URL, but shards are read from files"):
        expand(url)
    # A run makes relative names absolute first.
    config = load_config(PIXELS, [f"run.dir={tmp_path}/run", f"data.shards={url}"])
    with pytest.raises(InputError, match="is a URL, but shards are read from files"):
        builders.prepare_data(builders.resolved(config), progress=False)


def test_missing_shards_of_a_range_are_refused_by_name(tmp_path):
    for i in (0, 1, 3):
        tar(tmp_path / f"{i:05d}.tar", ("0.jpg", JPEG))
    with pytest.raises(InputError) as error:
        expand(f"{tmp_path}/{{00000..00005}}.tar")
    missing = ", ".join(f"{tmp_path}/{i:05d}.tar" for i in (2, 4, 5))
    assert str(error.value) == (
        f"3 of the 6 shards that '{tmp_path}/{{00000..00005}}.tar' names do not exist: {missing}; "
        "restore them, or name only those that exist"
    )
    with pytest.raises(InputError, match=r"1 of the 2 .* do not exist: .*/00007\*\.tar;"):
        expand(f"{tmp_path}/{{00000,00007}}*.tar")
    for pattern in ("{00000..00001}", "{00001..00000}", "{00000..00001..1}", "{0000{0,1},00000}"):
        assert [path.name for path in expand(f"{tmp_path}/{pattern}.tar")] == [
            "00000.tar",
            "00001.tar",
        ]
    with pytest.raises(InputError, match="names more than 1,000,000 shards"):
        expand(f"{tmp_path}/{{0..99999999999}}.tar")


def test_folders_and_images_beside_tars_are_counted(tmp_path):
    tar(tmp_path / "0.tar", ("0.jpg", JPEG))
    tar(tmp_path / "1.TAR", ("0.jpg", JPEG))
    tar(tmp_path / "more" / "2.tar", ("0.jpg", JPEG))
    files(
        tmp_path, "x.jpg", "._0.tar", "3.tar.gz", "0_stats.json", "index/index.bin", "@eaDir/0.jpg"
    )
    resolved = resolve(tmp_path)
    assert [path.name for path in resolved.paths] == ["0.tar", "1.TAR"]
    assert counts(resolved.left_out) == {
        "images beside tars": 1,
        "folders beside tars": 1,
        "hidden files": 1,
        "named *.gz": 1,
    }


def test_glob_leaves_out_system_folders_and_a_name_does_not(tmp_path):
    files(tmp_path, "a/0.jpg", "@eaDir/0.jpg")
    resolved = resolve(f"{tmp_path}/*")
    assert [path.name for path in resolved.paths] == ["a"]
    assert counts(resolved.left_out) == {"in a hidden or thumbnail folder": 1}
    assert [path.name for path in expand(f"{tmp_path}/@eaDir")] == ["@eaDir"]


ODD = ["a,b.tar", "[x].tar", "{1,2}.tar", "a b.tar", " blank .tar", "q?*.tar", "a, b.tar"]


@pytest.mark.parametrize("folder", ["plain", "a,b", "[2020] (x)", "{a,b}", " b ", "*"])
def test_existing_paths_win_over_patterns(tmp_path, folder, monkeypatch):
    root = tmp_path / folder
    for name in ODD:
        tar(root / name, ("0.jpg", JPEG))
    # What the names mean as patterns exists as well.
    for name in ("a.tar", "x.tar", "1.tar", "2.tar"):
        tar(root / name, ("0.jpg", JPEG))
    monkeypatch.chdir(root)
    for name in ODD:
        for pattern in (str(root / name), name):
            assert [path.name for path in expand(pattern)] == [name], pattern
    assert len(expand(str(root))) == len(expand(f"{root}/*.tar")) == len(ODD) + 4
    both = expand(f"{root}/[x].tar,{root}/a,b.tar, {root}/a b.tar ,{root}/{{1,2}}.tar")
    assert [path.name for path in both] == ["[x].tar", "a b.tar", "a,b.tar", "{1,2}.tar"]
    assert len(expand([root / name for name in ODD])) == len(ODD)
    assert absolute(tuple(ODD)) == tuple(str(root / name) for name in ODD)
    assert absolute("[x].tar, a b.tar") == f"{root}/[x].tar,{root}/a b.tar"
    # Patterns keep their meaning where no such path exists.
    assert {path.name for path in expand(f"{root}/[a1].tar")} == {"a.tar", "1.tar"}
    assert {path.name for path in expand(f"{root}/{{x,a}}.tar")} == {"a.tar", "x.tar"}
    assert len(expand(f"{tmp_path}/**/a,b.tar")) == 1
