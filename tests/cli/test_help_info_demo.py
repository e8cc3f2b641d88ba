"""`--help`, `stylefast info` and `stylefast demo`."""

import html
import json
import re
import shlex
import subprocess
import sys

import pytest

from stylefast.sampling.few_step import FEW_STEP_PRESETS
from stylefast.sampling.schedule import SCHEDULERS
from tests.cli.conftest import pixels


def test_help_loads_neither_torch_nor_pillow(checkout):
    code = (
        "import sys; from stylefast.cli import main; code = main(['generate', '--help']); "
        "print(code, [name for name in ('torch', 'PIL', 'numpy', 'tqdm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n0 []\n")


@pytest.mark.parametrize("command", ["generate", "bake", "train-lora", "demo", "info"])
def test_the_help_of_every_command_shows_an_example(stylefast, command):
    code, out, _ = stylefast(command, "--help")
    assert code == 0 and re.search(rf"^\s+stylefast {command}", out, re.MULTILINE)


def test_the_help_names_every_scheduler_and_preset(stylefast):
    words = re.findall(r"\w+", stylefast("generate", "--help")[1])
    assert {*SCHEDULERS, *FEW_STEP_PRESETS} <= {*words}


def test_info_as_json_says_what_was_found(stylefast):
    code, out, _ = stylefast("info", "--json")
    found = json.loads(out)
    assert code == 0 and found["devices"][0]["name"] == "cpu"
    assert found["packages"]["torch"]
    assert {"operation", "form", "reason", "refused"} == set(found["operations"][0])
    assert found["extension"]["found"] or found["extension"]["reason"]


def test_info_names_every_operation(stylefast):
    from stylefast.kernels import registry

    code, out, _ = stylefast("info")
    lines = [line.split() for line in out.splitlines() if line.startswith("operation")]
    assert code == 0
    assert [(line[1], line[2]) for line in lines] == [(row["operation"], row["form"]) for row in registry.report()]


def test_the_demos_page_shows_its_pictures_and_its_commands_make_them(stylefast, model_folder, tmp_path):
    out_folder = tmp_path / "demo"
    code, out, err = stylefast("demo", "--out", out_folder, "--model", model_folder, "--steps", "1", "--quiet")
    assert code == 0, err
    page = (out_folder / "index.html").read_text()
    assert out.strip() == str(out_folder / "index.html")
    pictures = re.findall(r'<img src="([^"]+)"', page)
    assert len(pictures) > 40 and all((out_folder / picture).is_file() for picture in pictures)
    assert "http" not in page and str(tmp_path) not in re.sub(r"<pre>.*?</pre>", "", page)

    command = next(line for line in re.findall(r"<pre>(.*?)</pre>", page) if "composed" in line)
    words = shlex.split(html.unescape(command))
    assert words[:2] == ["stylefast", "generate"]
    words[words.index("--out") + 1] = str(tmp_path / "again")
    code, out, err = stylefast(*words[1:])
    assert code == 0, err
    for path in out.split():
        assert pixels(path) == pixels(out_folder / "composed" / path.rpartition("/")[2])

    command = next(line for line in re.findall(r"<pre>(.*?)</pre>", page) if "demo/loras.json" in line)
    words = shlex.split(html.unescape(command))
    words[words.index("--out") + 1] = str(tmp_path / "loras-again")
    code, out, err = stylefast(*words[1:])
    assert code == 0, err
    made = [pixels(path) for path in out.split()]
    assert made == [pixels(out_folder / "loras" / path.rpartition("/")[2]) for path in out.split()]
    # dots, ink and both; each differs from the others, and from the picture without
    plain = [pixels(path) for path in (out_folder / "plain-loras").iterdir()]
    assert len(made) == 3 and len({*made, *plain}) == 4
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert {"dots", "ink", "dots 0.6 + ink 0.6"} <= {*captions}

    # an older demo is replaced, a folder of something else is not
    assert stylefast("demo", "--out", tmp_path, "--model", model_folder)[0] == 2


def test_a_demo_of_a_model_without_references_says_what_is_missing(stylefast, tmp_path):
    (tmp_path / "model").mkdir()
    code, _, err = stylefast("demo", "--model", tmp_path / "model", "--out", tmp_path / "demo")
    assert code == 2 and err.startswith("error: ") and "reference picture" in err
    assert not (tmp_path / "demo").exists()
