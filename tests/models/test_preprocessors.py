"""Control pictures from ordinary ones."""

import sys
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, ImageDraw

import stylefast as sf
from stylefast.errors import ImageError, InvalidRequest, MissingDependency


def square(mode: str = "RGB") -> Image.Image:
    picture = Image.new("L", (64, 48), 20)
    ImageDraw.Draw(picture).rectangle((16, 12, 47, 35), fill=230)
    return picture.convert(mode)


def test_edges_lie_where_the_picture_changes_and_nowhere_else():
    found = np.asarray(sf.canny(square()))
    assert found.shape == (48, 64, 3) and set(np.unique(found)) == {0, 255}
    lit = np.argwhere(found[..., 0])
    on_edge = [min(abs(x - 15.5), abs(x - 47.5)) < 2 or min(abs(y - 11.5), abs(y - 35.5)) < 2 for y, x in lit]
    assert len(lit) > 80 and all(on_edge)
    assert not np.asarray(sf.canny(Image.new("RGB", (32, 32), 90))).any()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_pictures_of_all_kinds_are_read(mode):
    given = square("I").point(lambda v: v * 256).convert("I;16") if mode == "I;16" else square(mode)
    assert (np.asarray(sf.canny(given)) == np.asarray(sf.canny(square()))).mean() > 0.97
    assert np.array_equal(sf.canny(np.asarray(square())), sf.canny(square()))


def test_thresholds_decide_what_is_an_edge():
    faint = Image.fromarray(np.repeat(np.linspace(90, 130, 64, dtype=np.uint8)[None], 64, 0)).convert("RGB")
    ImageDraw.Draw(faint).rectangle((20, 20, 40, 40), fill=(135, 135, 135))
    assert not np.asarray(sf.canny(faint, 400, 500)).any() and np.asarray(sf.canny(faint, 10, 20)).any()
    with pytest.raises(InvalidRequest, match="low is 300 and high 200"):
        sf.canny(square(), 300, 200)
    for wrong in (-1, float("nan"), "100"):
        with pytest.raises(InvalidRequest, match="low"):
            sf.canny(square(), wrong)
    with pytest.raises(ImageError):
        sf.canny(5)


def test_without_opencv_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingDependency, match=r"stylefast\[control\]"):
        sf.canny(square())


def test_other_kinds_come_from_controlnet_aux(monkeypatch):
    assert np.array_equal(sf.preprocess(square(), "canny"), sf.canny(square()))
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    with pytest.raises(MissingDependency, match="'depth_midas' needs controlnet-aux"):
        sf.preprocess(square(), "depth_midas")

    class Processor:
        def __init__(self, kind):
            self.kind = kind

        def __call__(self, picture):
            return Image.new("L", (32, 32), {"depth_midas": 77}[self.kind])  # of another size, as many are

    package, processor = ModuleType("controlnet_aux"), ModuleType("controlnet_aux.processor")
    processor.MODELS, processor.Processor = {"depth_midas": {}, "openpose": {}}, Processor
    package.processor = processor
    monkeypatch.setitem(sys.modules, "controlnet_aux", package)
    monkeypatch.setitem(sys.modules, "controlnet_aux.processor", processor)
    found = sf.preprocess(square(), "depth_midas")
    assert found.size == (64, 48) and found.mode == "RGB" and np.unique(found).tolist() == [77]
    with pytest.raises(InvalidRequest, match=r"kind is 'depth'; .*canny, depth_midas, openpose"):
        sf.preprocess(square(), "depth")
