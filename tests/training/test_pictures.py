import numpy as np
import pytest
from PIL import Image

from stylefast.errors import ImageError, InvalidRequest, PromptError
from stylefast.training.pictures import cropped, read_folder


def picture(path, size=(32, 32)):
    Image.new("RGB", size, "red").save(path)
    return path


def test_pictures_come_by_name_with_the_text_beside_them(tmp_path):
    for name in ("b.jpg", "a.png"):
        picture(tmp_path / name)
    (tmp_path / "a.txt").write_text("\ufeffa fish,\n in the sea \n", encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("x")
    (tmp_path / "more").mkdir()
    found = read_folder(tmp_path, "a cat")
    assert [(one.path.name, one.caption) for one in found] == [("a.png", "a fish, in the sea"), ("b.jpg", "a cat")]


def write(name, content=b"a fish"):
    return lambda folder: (folder / name).write_bytes(content)


BAD = {
    "no picture": ((), InvalidRequest, "has 0 pictures; training takes 1 to 100000 files"),
    "no caption": ((picture_of := lambda f: picture(f / "a.png"),), PromptError, "'a.png' has no caption; write"),
    "caption alone": ((picture_of, write("a.txt"), write("b.txt")), PromptError, "'b.txt' belongs to no picture"),
    "one stem": ((picture_of, lambda f: picture(f / "a.jpg")), InvalidRequest, "'a.jpg' and 'a.png' would share"),
    "not UTF-8": ((picture_of, write("a.txt", b"\xff\xfe\xfa")), PromptError, "'a.txt' can't be read .* UTF-8"),
    "a huge one": ((picture_of, write("a.txt", b"x" * 1_000_001)), PromptError, "has 1000001 bytes; at most"),
    "a long one": ((picture_of, write("a.txt", b"x" * 40_000)), PromptError, "the caption of a.png has 40000"),
}


@pytest.mark.parametrize("made, kind, message", BAD.values(), ids=BAD.keys())
def test_a_bad_folder_is_refused_by_name(tmp_path, made, kind, message):
    for make in made:
        make(tmp_path)
    with pytest.raises(kind, match=message):
        read_folder(tmp_path)


def test_no_folder_and_a_file_in_its_place_are_told_apart(tmp_path):
    with pytest.raises(InvalidRequest, match="does not exist; give a folder"):
        read_folder(tmp_path / "no")
    with pytest.raises(InvalidRequest, match="is a file; give a folder"):
        read_folder(picture(tmp_path / "a.png"))


@pytest.mark.parametrize(
    "size, ids",
    {
        (32, 32): (32, 32, 0, 0, 32, 32),
        (96, 64): (64, 96, 0, 8, 32, 32),  # scaled to 48 x 32
        (64, 160): (160, 64, 24, 0, 32, 32),  # to 32 x 80
        (20, 16): (16, 20, 0, 4, 32, 32),  # enlarged to 40 x 32
    }.items(),
)
def test_the_numbers_say_size_and_crop(tmp_path, size, ids):
    pixels, found = cropped(picture(tmp_path / "a.png", size), 32)
    assert found == ids and pixels.shape == (3, 32, 32)


def test_the_crop_is_the_middle(tmp_path):
    # thirds of a wide picture in three colours, whose middle one is as wide as high
    array = np.zeros((32, 96, 3), np.uint8)
    for third in range(3):
        array[:, 32 * third : 32 * third + 32, third] = 255
    Image.fromarray(array).save(tmp_path / "a.png")
    pixels, ids = cropped(tmp_path / "a.png", 32)
    assert ids[2:4] == (0, 32)
    assert (pixels[1] == 1).all() and (pixels[[0, 2]] == -1).all()


def test_a_broken_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(ImageError, match=r"a\.png"):
        cropped(tmp_path / "a.png", 32)
