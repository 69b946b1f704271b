"""How commands read and write files and pictures: whole or not at all, nothing in place of what is read."""

import io
import os
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from examples import files, pictures
from examples.pictures import PictureError

ROOT = Path(__file__).parents[2]


def fail(error, *arguments):
    raise error


# Writing.


def test_a_file_is_replaced_when_all_is_written(tmp_path):
    path, link = tmp_path / "out.txt", tmp_path / "link.txt"
    files.write(path, "before ±")
    path.chmod(0o640)
    link.symlink_to(path)
    with files.whole(link) as file:
        file.write(b"after")
        assert path.read_text(encoding="utf-8") == "before ±"
    assert path.read_text() == link.read_text() == "after" and link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert {each.name for each in tmp_path.iterdir()} == {"out.txt", "link.txt"}


@pytest.mark.parametrize("before", ["before", None])
@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (OSError(28, "No space left on device"), files.FileError, r"out\.txt: No space left on device$"),
        (OSError("encoder error -2"), files.FileError, r"out\.txt: encoder error -2$"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
        (ValueError("a bug"), ValueError, "^a bug$"),
    ],
    ids=["full", "encoder", "interrupt", "bug"],
)
def test_what_is_not_written_to_its_end_leaves_nothing(before, raised, expected, message, tmp_path):
    path = tmp_path / "out.txt"
    if before:
        path.write_text(before)
    with pytest.raises(expected, match=message), files.whole(path) as file:
        file.write(b"half")
        raise raised
    assert [each.read_text() for each in tmp_path.iterdir()] == ([before] if before else [])


def test_a_full_disk(tmp_path, full_disk):
    path = tmp_path / "out.txt"
    files.write(path, 50 * "a")
    for write in (files.write, files.append):
        with full_disk(), pytest.raises(files.FileError, match=r"out\.txt: File too large$"):
            write(path, 200 * "b")
    assert path.read_text() == 50 * "a" and list(tmp_path.iterdir()) == [path]
    for _ in range(2):
        files.append(path, "b\n")
    assert path.read_text() == 50 * "a" + "\nb\nb\n"  # a line that lost its end gets it back


@pytest.mark.parametrize("write", [files.write, files.append])
def test_a_folder_that_is_none(write, tmp_path):
    (tmp_path / "file").write_text("")
    for folder, reason in (("file", "Not a directory"), ("nowhere", "No such file or directory")):
        with pytest.raises(files.FileError, match=rf"{folder}/out\.txt: {reason}$"):
            write(tmp_path / folder / "out.txt", "text")


def test_commands_write_in_no_other_way():
    """But for /proc and what their own processes tell each other."""
    other = re.compile(r'write_text\(|write_bytes\(|savefig\((?!file)|os\.replace|copyfile|open\((.*, )?"[wax]b?"')
    allowed = re.compile(r"clear_refs|files\.|log\.open\(|open\(self\.path|os\.devnull")
    found = [
        (path.name, line)
        for folder in ("bench", "examples")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in path.read_text().splitlines()
        if path.name != "files.py" and other.search(line) and not allowed.search(line)
    ]
    assert not found


# What must not be written.


@pytest.fixture
def picture(tmp_path, monkeypatch):
    """A file in a folder of its own, the current one."""
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    path = tmp_path / "photos" / "street.png"
    path.write_text("of a user")
    return path


def test_an_output_that_is_an_input(picture, tmp_path):
    (picture.parent / "symlink.png").symlink_to("street.png")
    (picture.parent / "hard.png").hardlink_to(picture)
    (tmp_path / "folder").symlink_to("photos")
    spellings = ("street.png", "../photos/street.png", "symlink.png", "hard.png", "../folder/street.png")
    for output in spellings:
        for given in (picture, Path("street.png"), Path("symlink.png")):
            with pytest.raises(files.FileError, match=rf"^{re.escape(output)} would replace .*\.png, which is read"):
                files.check([Path("other.png"), Path(output)], [tmp_path / "missing", given])
    files.check([Path("other.png")], [picture])
    assert not Path("other.png").exists()


def test_two_outputs_that_are_one(picture):
    Path("symlink.png").symlink_to("new.png")  # to what is not there yet
    for other in ("new.png", "../photos/new.png", "symlink.png"):
        with pytest.raises(files.FileError, match="are one file, expected one for each output"):
            files.check([Path("new.png"), Path("another.png"), Path(other)])


def test_outputs_that_cannot_be_written(picture, monkeypatch):
    for path, message in (
        (picture / "out.png", r"street\.png/out\.png cannot be written: .*street\.png is no folder"),
        (picture.parent, "photos cannot be written: it is there and no file"),
        (Path("/dev/null"), "/dev/null cannot be written: it is there and no file"),
    ):
        with pytest.raises(files.FileError, match=message):
            files.check([path])
    files.check([picture, Path("no/such/folder/out.png")])  # folders may be made
    for closed, message in (
        (picture, "it is there, and no permission to replace it"),
        (picture.parent, "no permission in"),
    ):
        monkeypatch.setattr(os, "access", lambda path, mode, closed=closed: Path(path) != closed)
        with pytest.raises(files.FileError, match=rf"street\.png cannot be written: {message}"):
            files.check([Path("street.png")])


# Text, commands.


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_text_of_any_editor(mark, end, tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(mark + end.join([b"one", "zwei, für".encode(), b""]))
    assert files.read(path) == "one\nzwei, für\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("für".encode("latin-1"), "must be text in UTF-8, got byte 0xfc at 1"),
        ("für".encode("utf-16"), "must be text in UTF-8, got byte 0x00 at 3"),
        ("für".encode("utf-16-be"), "must be text in UTF-8, got byte 0x00 at 0"),
        (None, "list.txt: No such file or directory"),
    ],
)
def test_text_in_another_encoding(content, message, tmp_path):
    path = tmp_path / "list.txt"
    if content:
        path.write_bytes(content)
    with pytest.raises(files.FileError) as error:
        files.read(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)


def test_a_command_ends_with_one_line(monkeypatch, tmp_path):
    """What has no file to blame stays what it is."""
    for error, message in (
        (files.FileError("out.txt: no"), "error: out.txt: no"),
        (FileExistsError(17, "File exists", "out"), "error: out: File exists"),
        (KeyError("x"), "error: 'x'"),
    ):
        with pytest.raises(SystemExit) as end:
            files.run(partial(fail, error), KeyError)
        assert end.value.code == message
    with pytest.raises(OSError, match="no file"):
        files.run(partial(fail, OSError("no file")))
    screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", screen)
    files.run(lambda: print(Path(os.fsdecode(b"caf\xe9.png")), flush=True))
    assert screen.buffer.getvalue() == b"caf\xe9.png\n"


# Pictures.


def stored(rng: np.random.Generator) -> dict[str, bytes]:
    """Return a small picture in every format and mode that Pillow can write here."""
    PIL.Image.init()
    found = {}
    colours = PIL.Image.fromarray(rng.integers(0, 256, (13, 17, 3), np.uint8))
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6
    options = [{}, {"exif": exif}, {"compression": "tiff_lzw"}, {"compression": "group4"}, {"compression": "jpeg"}]
    for kind in sorted(PIL.Image.SAVE.keys() & PIL.Image.OPEN.keys()):
        for mode in ("RGB", "RGBA", "P", "1", "I;16", "F") if kind != "ICNS" else ("RGB",):  # which are slow to make
            for i, option in enumerate(options if kind == "TIFF" else options[:2]):
                file = io.BytesIO()
                try:
                    picture = colours.convert("I" if mode == "I;16" else mode).convert(mode)
                    picture.save(file, kind, **option)
                except Exception:  # the format has not this mode, or the build not this format
                    continue
                found[f"{kind} {mode} {i}"] = file.getvalue()
    return found


def broken(content: bytes, rng: np.random.Generator) -> bytes:
    """Cut a file, change some bytes, or those of a number in its head."""
    changed = bytearray(content)
    match rng.integers(3):
        case 0:
            del changed[rng.integers(len(changed)) :]
        case 1:
            for at in rng.integers(0, len(changed), rng.integers(1, 5)):
                changed[at] = rng.integers(256)
        case _:
            at = rng.integers(min(len(changed), 200))
            changed[at : at + 4] = bytes([rng.choice([0, 127, 255])]) * len(changed[at : at + 4])
    return bytes(changed)


@pytest.mark.filterwarnings("ignore:.*format is deprecated")
@pytest.mark.parametrize("count", [4, pytest.param(80, marks=pytest.mark.slow)])
def test_whatever_is_in_a_file_it_is_a_picture_or_one_line(count, tmp_path, capfd):
    """And nothing is printed; most formats are there, some files are still read, most are not."""
    rng = np.random.default_rng(0)
    formats = stored(rng)
    capfd.readouterr()  # what Pillow prints about modes that a format has not
    assert {name.split()[0] for name in formats} >= {"PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "PCX"}
    path, outcomes = tmp_path / "picture", []
    for content in formats.values():
        for mode in ("RGB", None) * (count // 2):
            path.write_bytes(broken(content, rng))
            try:
                image = pictures.read(path, mode, upright=mode is not None)
            except PictureError as error:
                told = str(error)
                assert str(path) in told and told.isprintable() and len(told) < len(str(path)) + 300, told
                outcomes.append(False)
            else:
                assert image.size and image.ndim > 1 and (mode is None or image.dtype == np.uint8)
                outcomes.append(True)
    assert len(outcomes) > 500 and 0.1 < np.mean(outcomes) < 0.9
    assert capfd.readouterr() == ("", "")


def test_pictures_of_any_mode_but_more_than_8_bits(tmp_path):
    """Which would be clipped."""
    path, image = tmp_path / "depth.png", PIL.Image.fromarray(np.full((12, 20, 3), 77, np.uint8))
    for mode in ("L", "RGBA", "P"):
        image.convert(mode).save(path)
        assert pictures.read(path, "RGB").shape == (12, 20, 3)
    PIL.Image.fromarray(np.array([[0, 256, 65535]], np.uint16)).save(path)
    with pytest.raises(PictureError, match=r"depth\.png must have 8 bits a channel, got a picture of mode I;16"):
        pictures.read(path, "RGB")


def test_pictures_of_a_camera_held_upright(tmp_path):
    path, turn_right = tmp_path / "upright.png", 6
    colours = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = turn_right
    PIL.Image.fromarray(colours).save(path, exif=exif)
    np.testing.assert_array_equal(pictures.read(path, "RGB"), colours)
    np.testing.assert_array_equal(pictures.read(path, "RGB", upright=True), np.rot90(colours, -1))


def test_large_pictures(tmp_path, monkeypatch, capfd, recwarn):
    """Those that Pillow warns of are read, in silence; of those that it refuses is told what to do."""
    path = tmp_path / "aerial.png"
    PIL.Image.new("L", (40, 40)).save(path)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1599)
    assert pictures.read(path, "RGB").shape == (40, 40, 3)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 799)
    with pytest.raises(PictureError, match=r"aerial\.png has more than 1,598 pixels: shrink it, or cut it into"):
        pictures.read(path, "RGB")
    assert capfd.readouterr() == ("", "") and not recwarn.list


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), r"MemoryError\(\)"),
        (KeyError(277), r"KeyError\(277\)"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (ValueError(300 * "long "), "long long"),
    ],
)
def test_errors_that_say_little(error, message, monkeypatch):
    monkeypatch.setattr(PIL.Image, "open", partial(fail, error))
    with pytest.raises(PictureError, match=f"^cannot read street.png as a picture: {message}") as raised:
        pictures.read(Path("street.png"), "RGB")
    assert len(str(raised.value)) < 300


def test_an_interrupt_while_a_picture_is_read(monkeypatch):
    monkeypatch.setattr(PIL.Image, "open", partial(fail, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        pictures.read(Path("street.png"), "RGB")
