"""The figures in the documentation are those of the recorded runs, and what is counted is counted again."""

import json
import subprocess

import pytest

from benchmarks import banks, copies, export_sdxl, leak, load, loras, planning
from benchmarks.kernels.report import markdown
from benchmarks.runtime.report import markdown as runtime_table
from benchmarks.serving import report as serving
from benchmarks.serving.load import MOST_LEVELS
from benchmarks.serving.mix import STYLES


def recorded(checkout, name: str) -> list[dict]:
    """The results file `name` as it is and as it was committed."""
    path = f"benchmarks/results/{name}"
    texts = [(checkout / path).read_text()]
    # a benchmark writes its file anew: then the documentation still shows the committed run
    committed = subprocess.run(["git", "-C", str(checkout), "show", f"HEAD:{path}"], capture_output=True, text=True)
    if committed.returncode == 0:
        texts.append(committed.stdout)
    return [json.loads(text) for text in texts]


@pytest.mark.parametrize("device", ["cpu"])
def test_the_table_of_a_device_is_that_of_its_results_file(checkout, device):
    # otherwise: paste what `benchmarks.kernels.report.markdown` makes of the file into docs/kernels.md
    page = (checkout / "docs" / "kernels.md").read_text()
    assert any(markdown(content["results"]) in page for content in recorded(checkout, f"kernels-{device}.json"))


def test_what_the_page_of_banks_says_of_speed_is_that_of_the_results_file(checkout):
    # otherwise: paste what `benchmarks.runtime.report.markdown` makes of the file into docs/banks.md
    page = (checkout / "docs" / "banks.md").read_text()
    joined, found = " ".join(page.split()), []
    for content in recorded(checkout, "runtime-cpu.json"):
        mixed = next(result for result in content["results"] if result["case"].startswith("mixed"))
        times = {figure["what"]: figure["value"] for figure in mixed["figures"]}
        words = (
            f"take {times['eight styles / one style']:.2f} times as long as eight pictures of one style, eight "
            f"banks {times['eight banks / one bank']:.2f} times as long as one bank"
        )
        found.append(runtime_table(content["results"]) in page and words in joined)
    assert any(found)


def test_what_the_page_of_serving_says_of_load_is_that_of_the_results_file(checkout):
    # otherwise: paste what `benchmarks.load.markdown` makes of the file into docs/serving.md
    page = (checkout / "docs" / "serving.md").read_text()
    assert any(load.markdown(content) in page for content in recorded(checkout, "load-cpu.json"))


def test_what_the_page_of_serving_says_of_the_host_is_that_of_the_results_file(checkout):
    # otherwise: paste what `benchmarks.planning.markdown` makes of the file into docs/serving.md
    page = (checkout / "docs" / "serving.md").read_text()
    contents = recorded(checkout, "planning-cpu.json")
    assert any(planning.markdown(content) in page for content in contents)
    for content in contents:
        pages = [row for row in content["results"]["cases"] if row["what"] == planning.WHAT[1]]
        assert all(row["python_to_cpp"] > 2.5 for row in pages)


def test_what_the_page_of_banks_says_of_loading_is_that_of_the_results_file(checkout):
    # otherwise: paste what `benchmarks.copies.markdown` makes of the file into docs/banks.md
    page = (checkout / "docs" / "banks.md").read_text()
    contents = recorded(checkout, "copies-cpu.json")
    assert any(copies.markdown(content) in page for content in contents)
    for content in contents:
        assert all(row["caller_ms"] < 1 for row in content["results"]["loads"])
        assert f"{content['results']['pieces']} pieces" in page
        assert f"({content['results']['bytes'] / 1e6:.0f} MB)" in page


@pytest.mark.parametrize("table", [banks.modes_table, banks.layers_table], ids=["kinds of storage", "fewer layers"])
def test_the_tables_of_banks_are_those_of_their_results_file(checkout, table):
    # otherwise: paste what the function makes of the file into docs/banks.md
    page = (checkout / "docs" / "banks.md").read_text()
    assert any(table(content) in page for content in recorded(checkout, "banks-cpu.json"))


def test_the_table_of_full_size_exports_is_that_of_its_results_file(checkout):
    # otherwise: paste what `benchmarks.export_sdxl.markdown` makes of the file into docs/export.md
    page = (checkout / "docs" / "export.md").read_text()
    assert any(export_sdxl.markdown(content) in page for content in recorded(checkout, "export-sdxl.json"))


@pytest.fixture(scope="module")
def sdxl():
    return banks.whole_config(banks.sdxl_config())


@pytest.fixture(scope="module")
def row_flop(sdxl):
    return banks.row_flop(sdxl)


def test_the_bytes_and_the_work_of_banks_are_those_that_are_counted_now(checkout, sdxl, row_flop):
    content = recorded(checkout, "banks-cpu.json")[0]
    assert content["row_flop"] == row_flop
    counted = banks.counted_modes(sdxl, row_flop)
    kept = [{name: mode[name] for name in expected} for mode, expected in zip(content["modes"], counted, strict=True)]
    assert kept == counted
    assert content["layers"] == banks.counted_layers(sdxl)
    assert not content["quick"] and content["steps"] == banks.STEPS and tuple(content["size"]) == banks.SIZE


@pytest.fixture
def banks_in_words(checkout) -> str:
    """docs/banks.md with its lines joined."""
    return " ".join((checkout / "docs" / "banks.md").read_text().split())


def test_what_the_page_of_banks_says_of_work_is_what_is_counted(banks_in_words, sdxl, row_flop):
    row, shapes = row_flop, banks.BankShapes.from_config(sdxl, banks.SIZE)
    assert f"one UNet row is {row / 1e12:.2f} TFLOP" in banks_in_words
    added = {mode["store"]: mode["added_flop"] for mode in banks.counted_modes(sdxl, row)}
    assert added["latents"] // added["hidden"] == 14
    assert "the projections are a fourteenth of what the reference's rows would cost" in banks_in_words
    # a page doubles what attention costs: the products with its keys and with its values
    attention = sum(2 * 2 * layer.tokens**2 * layer.channels for layer in shapes.layers)
    cached = 2 * (row + attention)
    assert f"at least {cached / 790e9:.0f} ms a step ({cached / 1e12:.1f} TFLOP at 790 TFLOP/s" in banks_in_words
    assert f"Running the reference again takes {2 * row / 790e9:.0f} ms at that rate" in banks_in_words


def test_what_the_page_of_banks_says_of_bytes_is_what_is_counted_and_measured(checkout, banks_in_words, sdxl):
    step = 2 * banks.page_bytes(sdxl, banks.SIZE)
    layers = banks.BankShapes.from_config(sdxl, banks.SIZE).layers
    values = sum(2 * 2 * layer.tokens * layer.channels for layer in layers)
    assert f"which is {100 * (1 - 2 * values / step):.1f} % of an fp16 bank" in banks_in_words
    checked = [
        mode["fetch"]["check_seconds"]
        for content in recorded(checkout, "banks-cpu.json")
        for mode in content["modes"]
        if (mode["store"], mode["type"]) == ("kv", "fp16")
    ]
    words = [f"({step / 1e6:.0f} MB, one step in fp16, took {seconds:.2f} s on the CPU above" for seconds in checked]
    assert any(one in banks_in_words for one in words)


def test_what_reading_costs_is_that_of_its_results_file(checkout):
    joined, found = " ".join((checkout / "docs" / "banks.md").read_text().split()), []
    for content in recorded(checkout, "reading-cpu.json"):
        pages, weights = content["results"]["pages"], content["results"]["weights"]
        words = (
            f"takes {pages['read_seconds']:.2f} s read and {pages['mapped_seconds']:.2f} s mapped; weights into memory "
            f"of their own {weights['read_seconds']:.2f} s read, and {weights['mapped_seconds']:.2f} s mapped"
        )
        found.append(words in joined)
    assert any(found)


def test_what_the_page_of_the_architecture_says_of_speed_is_that_of_the_results_file(checkout):
    words = " ".join((checkout / "docs" / "architecture.md").read_text().split())
    found = []
    for content in recorded(checkout, "compare-cpu.json"):
        ratios = {row["case"]: row["ratio"] for row in content["results"]["cases"]}
        whole = [ratio for case, ratio in ratios.items() if " " in case]
        parts = [ratio for case, ratio in ratios.items() if " " not in case]
        found.append(
            f"pictures and jobs took {min(whole):.2f} to {max(whole):.2f} times as long, operations {min(parts):.2f} "
            f"to {max(parts):.2f}" in words
        )
    assert any(found)


def test_what_the_page_of_loras_says_of_speed_is_that_of_the_results_file(checkout):
    # otherwise: paste what `benchmarks.loras.markdown` makes of the file into docs/loras.md
    page = (checkout / "docs" / "loras.md").read_text()
    assert any(loras.markdown(content) in page for content in recorded(checkout, "loras-cpu.json"))


def test_what_the_page_of_serving_says_of_threads_is_that_of_the_results_file(checkout):
    joined, found = " ".join((checkout / "docs" / "serving.md").read_text().split()), []
    for content in recorded(checkout, "threads-cpu.json"):
        (case,) = content["results"]
        figures = {figure["what"]: figure["value"] for figure in case["figures"]}
        words = (
            f"{figures['UNet calls of threads']:g} calls for eight pictures of 20 steps, in "
            f"{figures['threads / submit']:.2f} times the time"
        )
        found.append(words in joined)
    assert any(found)


def test_what_the_page_of_the_service_says_of_speed_is_that_of_the_results_file(checkout):
    # otherwise: python -m benchmarks.serving.report writes the chart, and prints what belongs into docs/serving-http.md
    page = (checkout / "docs" / "serving-http.md").read_text()
    drawn, joined, found = (checkout / "docs" / "serving-load.svg").read_text(), " ".join(page.split()), []
    for content in recorded(checkout, "serving-cpu.json"):
        said = all(sentence in joined for sentence in serving.sentences(content))
        found.append(said and serving.markdown(content) in page and serving.chart(content) == drawn)
    assert any(found)


def test_the_servers_compared_drew_the_same_pictures_and_all_requests_ended(checkout):
    results = recorded(checkout, "serving-cpu.json")[0]["results"]
    compared = results["load"]["same_pictures"]["levels"]
    assert set(compared) == set(STYLES) and max(compared.values()) <= MOST_LEVELS
    assert all(entry["refused"] == 0 for *_, entry in serving.entries(results["load"]))
    assert all(results[part]["passed"] for part in ("soak", "crash", "starts"))


def test_what_the_page_of_styles_says_of_leaks_is_that_of_the_results_file(checkout):
    # otherwise: paste what `benchmarks.leak.markdown` makes of the file into docs/styles.md
    page = (checkout / "docs" / "styles.md").read_text()
    assert any(leak.markdown(content) in page for content in recorded(checkout, "leak-cpu.json"))
