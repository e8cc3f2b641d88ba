import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.tiny_model.classifier import (
    PictureClassifier,
    accuracy,
    classify,
    load_classifier,
    rendered,
    save_classifier,
)
from benchmarks.tiny_model.pictures import CONTENTS, STYLES
from stylefast.errors import ImageError, ModelFormatError, ModelNotFound
from tests.support.fp64 import close, measured


@pytest.fixture(scope="module")
def shipped():
    return load_classifier()


def test_it_names_content_and_style_of_fresh_drawings(shipped):
    found = accuracy(shipped, *rendered(seed=987, count=400))
    assert found["content"] >= 0.95 and found["style"] >= 0.95


def test_names_of_contents_and_styles_are_those_of_the_generator(shipped):
    assert shipped.contents == CONTENTS
    assert shipped.styles[:12] == STYLES


def judged(classifier, pictures, kind):
    """The classifier's verdict on pictures of its own size, and how to have it in fp64."""

    def verdict(classifier, pictures):
        with torch.no_grad():
            return classifier(pictures)[("content", "style", "palette").index(kind)].softmax(1)

    return measured(verdict, classifier, torch.from_numpy(pictures).float().permute(0, 3, 1, 2) / 255 * 2 - 1)


def test_pil_images_bytes_and_floats_give_the_same_verdict(shipped):
    pictures, _ = rendered(seed=1, count=6)
    expected = classify(shipped, pictures).style
    assert torch.equal(classify(shipped, [Image.fromarray(p) for p in pictures]).style, expected)
    close(classify(shipped, pictures / np.float32(255)).style, judged(shipped, pictures, "style"))


def test_larger_pictures_are_reduced_before_they_are_judged(shipped):
    pictures, labels = rendered(seed=2, count=24)
    large = pictures.repeat(2, axis=1).repeat(2, axis=2)
    close(classify(shipped, large).content, judged(shipped, pictures, "content"))


def test_a_saved_classifier_judges_as_before(tmp_path):
    torch.manual_seed(0)
    # the file holds half precision
    classifier = PictureClassifier(("a", "b"), ("c", "d", "e"), ("f",)).half().float().eval()
    save_classifier(classifier, tmp_path / "c.safetensors")
    loaded = load_classifier(tmp_path / "c.safetensors")
    pictures, _ = rendered(seed=3, count=4)
    assert loaded.styles == ("c", "d", "e")
    assert torch.equal(classify(loaded, pictures).style, classify(classifier, pictures).style)


def test_a_missing_file_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(ModelNotFound, match="benchmarks tiny_model --stage classifier"):
        load_classifier(tmp_path / "none.safetensors")


@pytest.mark.parametrize("content", [b"", b"no tensors here", bytes(100)], ids=["empty", "text", "zeros"])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "c.safetensors").write_bytes(content)
    with pytest.raises(ModelFormatError, match="does not hold a picture classifier"):
        load_classifier(tmp_path / "c.safetensors")


@pytest.mark.parametrize("shape", [(64, 64, 3), (1, 3, 64, 64), (2, 64, 64, 4)], ids=str)
def test_another_shape_is_refused(shipped, shape):
    with pytest.raises(ImageError, match="expected"):
        classify(shipped, np.zeros(shape, np.uint8))
