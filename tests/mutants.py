"""Put mistakes into the code, one at a time, and see that the tests find them.

    python tests/mutants.py            # all of them, in a copy of the checkout
    python tests/mutants.py seed mask  # those whose names contain one of these words

Prints a table of what was caught, by which test, in how many seconds. Exits with 1 if a mutant survives, if the text
that it replaces is no longer there exactly once, or if the named tests fail without any mutant.
"""

import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
FOLDERS = ("stylefast", "kernels", "export", "benchmarks", "tests")
SECONDS = 900  # of one run of pytest; a mutant under which the tests don't end is caught as well


class Mutant(NamedTuple):
    """A mistake in one place, and the tests of which one at least must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    why: str


MUTANTS = (
    Mutant(
        "bank pages copied",
        "stylefast/models/unet.py",
        "inputs.references, affine, inputs.pool)",
        "inputs.references, affine, inputs.pool and type(inputs.pool)(*(x.clone() for x in inputs.pool)))",
        "tests/runtime/test_bank_pages.py::test_attention_reads_a_banks_keys_and_values_where_they_lie",
        "copies of keys and values in each layer cost what a bank saves",
    ),
    Mutant(
        "bank variance dropped in AdaIN",
        "stylefast/models/row_table.py",
        "(pages.means[layer], pages.variances[layer])",
        "(pages.means[layer], torch.ones_like(pages.variances[layer]))",
        "tests/models/test_unet_pages.py::test_a_page_of_the_bank_equals_the_live_reference",
        "a bank must give the contrast of its reference, and not only its mean",
    ),
    Mutant(
        "AdaIN on references too",
        "stylefast/models/unet.py",
        "(inputs.adain_page, inputs.adain_strength, *inputs.pool_stats)",
        "(inputs.adain_page.clamp(min=0), torch.ones_like(inputs.adain_strength), *inputs.pool_stats)",
        "tests/engine/test_style_aligned.py::test_the_first_prompt_lends_its_style_as_in_the_oracle[default]",
        "a reference stays the picture that it would be without readers",
    ),
    Mutant(
        "guidance branches swapped",
        "stylefast/sampling/guidance.py",
        "zip(BRANCHES, (1.0 - w, d, -d, w), strict=True)",
        "zip(BRANCHES, (1.0 - w, -d, d, w), strict=True)",
        "tests/sampling/test_guidance.py",
        "style guidance would push away from the style",
    ),
    Mutant(
        "bank pages not released",
        "stylefast/runtime/banks/bank_pages.py",
        "        if self._stream is None:\n            self._pool.release(_numbers(keys))\n            return\n",
        "        if self._stream is None:\n            return\n",
        "tests/runtime/test_bank_pages.py::test_host_blocks_bring_the_same_pages_as_the_tensors_themselves[kv in fp32]",
        "pinned pages would fill the pool until no request fits",
    ),
    Mutant(
        "IP-Adapter gate ignored",
        "stylefast/models/row_table.py",
        "                rows.image_strength[:, :, module],\n",
        "                torch.ones_like(rows.image_strength[:, :, module]),\n",
        "tests/engine/test_instant_style.py::test_blocks_equal_the_scales_of_diffusers[style]",
        "the picture would act in all modules, content included",
    ),
    Mutant(
        "picture mask dropped",
        "stylefast/models/row_table.py",
        "                rows.image_mask,\n",
        "                torch.full_like(rows.image_mask, -1),\n",
        "tests/engine/test_instant_style.py::test_a_mask_bounds_the_picture_as_in_diffusers",
        "a masked picture would act everywhere",
    ),
    Mutant(
        "text of each row ignored",
        "stylefast/models/row_table.py",
        "return CrossInputs(*self.text_kv[layer], rows.text_page, self.text_lengths, images, keep)",
        "return CrossInputs(*self.text_kv[layer], torch.zeros_like(rows.text_page), self.text_lengths, images, keep)",
        "tests/engine/test_plain.py::test_a_negative_prompt_equals_diffusers",
        "all rows would read the first row's prompt",
    ),
    Mutant(
        "DreamStyler stage off by one",
        "stylefast/styles/dream_styler.py",
        "return min(stages - 1, stage)",
        "return min(stages - 1, stage + 1)",
        "tests/styles/test_dream_styler.py::test_stage_edges_of_six_stages",
        "steps would read vectors that were learned for more noise",
    ),
    Mutant(
        "the same group always first",
        "stylefast/runtime/scheduler.py",
        "key=lambda g: (self._turns[g], self._jobs[g].number),",
        "key=lambda g: self._jobs[g].number,",
        "tests/engine/test_batching.py::test_a_long_job_does_not_keep_short_ones_waiting",
        "a long job would starve those that came after it",
    ),
    Mutant(
        "deadline ignored",
        "stylefast/runtime/scheduler.py",
        "j.expires is not None and now >= j.expires}",
        "j.expires is not None and now < 0}",
        "tests/engine/test_jobs.py::test_a_job_whose_deadline_passes_while_it_runs_fails_and_frees_all",
        "late pictures would take room from those that are in time",
    ),
    Mutant(
        "one seed for a group",
        "stylefast/runtime/plan/sample.py",
        "{sample: noise_generator(sample.request) for sample in samples}",
        "{sample: noise_generator(samples[0].request) for sample in samples}",
        "tests/engine/test_style_aligned.py::test_the_first_prompt_lends_its_style_as_in_the_oracle[default]",
        "pictures of one style would begin with the same noise",
    ),
    Mutant(
        "LoRA strengths of the first row",
        "stylefast/models/row_loras.py",
        "scale.repeat_interleave(self.units.shape[2], dim=1))",
        "scale[:1].expand_as(scale).repeat_interleave(self.units.shape[2], dim=1))",
        "tests/engine/test_row_loras.py::test_every_row_gives_what_diffusers_gives_with_its_loras",
        "rows would add each other's LoRAs",
    ),
    Mutant(
        "LoRAs not released",
        "stylefast/runtime/steps/conditions.py",
        "        self.loras.release(list(conditions.held_loras))\n",
        "",
        "tests/engine/test_row_loras.py::test_nothing_is_held_when_all_is_done",
        "the pool would fill until no other LoRA fits",
    ),
    Mutant(
        "text kept without its LoRAs",
        "stylefast/runtime/steps/conditions.py",
        "tuple(use.key for use in sample.loras)",
        "tuple(0 for _ in sample.loras)",
        "tests/engine/test_row_loras.py::test_all_differ_and_share_one_call_a_step",
        "a prompt's keys and values would be those of another request's LoRAs",
    ),
    Mutant(
        "units of an earlier batch kept",
        "stylefast/runtime/backends/exported.py",
        "        unit.fill_(NO_UNIT)  # an earlier batch of this shape may have used more\n",
        "",
        "tests/runtime/test_exported.py::test_units_of_an_earlier_batch_are_gone",
        "an exported graph would add LoRAs of pictures that are done",
    ),
    Mutant(
        "texts read beyond their length",
        "stylefast/models/row_table.py",
        "return CrossInputs(*self.text_kv[layer], rows.text_page, self.text_lengths, images, keep)",
        "return CrossInputs(*self.text_kv[layer], rows.text_page, None, images, keep)",
        "tests/engine/test_prompts.py::test_a_batch_of_all_lengths_and_syntaxes_equals_the_short_form_and_each_alone",
        "a short prompt beside a long one would attend to nothing's keys",
    ),
    Mutant(
        "mean of weighted text not restored",
        "stylefast/models/text_chunks.py",
        "return (scaled * ratio).to(states.dtype)",
        "return scaled.to(states.dtype)",
        "tests/models/test_long_prompts.py::test_a1111_weights_multiply_and_restore_the_mean_of_each_chunk",
        "weights would change the strength of the whole prompt",
    ),
    Mutant(
        "last sampler step off",
        "stylefast/sampling/solvers.py",
        "(sigma' - sigma)\n    ratio = sigmas[1:] / sigmas[:-1]",
        "(sigma' - sigma)\n    ratio = sigmas[1:].clip(sigmas[-2]) / sigmas[:-1]",
        "tests/sampling/test_schedules.py::test_euler_equals_diffusers",
        "pictures would keep the noise of the last level",
    ),
)


def import_libraries() -> None:
    """Import what takes each run of pytest seconds."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRITON_INTERPRET": "1"}
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    assert AutoencoderKL and EulerDiscreteScheduler and StableDiffusionXLPipeline and UNet2DConditionModel
    assert CLIPTextModelWithProjection and CLIPVisionModelWithProjection


def copy_checkout(folder: Path) -> Path:
    """Copy what the tests read, the compiled extension included; return the copy."""
    for name in FOLDERS:
        shutil.copytree(CHECKOUT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py"):  # by the latter stylefast knows a checkout
        shutil.copy(CHECKOUT / name, folder)
    return folder


def failing(checkout: Path, tests) -> tuple[int, list[str], str]:
    """Run tests up to the first that fails; return pytest's exit code (0 passed, 1 failed), the failures, its output.

    A run that does not end in time counts as failed. It is a fork of this process, which has the libraries imported.
    """
    log = checkout / "pytest.log"
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if stream == 1 else os.O_APPEND)), stream)
        os.chdir(checkout)
        sys.path.insert(0, str(checkout))
        os._exit(pytest.main(["-q", "-x", "-rfE", "-p", "no:cacheprovider", *tests]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    output = log.read_text()
    if code == -signal.SIGALRM:
        return 1, [f"{tests[0]}, which did not end"], output
    return code, re.findall(r"^(?:FAILED|ERROR) (tests/\S+?)(?:\[| - |$)", output, re.MULTILINE), output


def caught_by(checkout: Path, mutant: Mutant) -> str | None:
    """Put a mutant into a copy, run its tests, and take it out again; return the test that failed, or None.

    Raises SystemExit if the mutant's text is not there exactly once, or if its tests could not be run.
    """
    file = checkout / mutant.file
    source = file.read_text()
    if source.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.file} has its text {source.count(mutant.old)} times; mend MUTANTS")
    file.write_text(source.replace(mutant.old, mutant.new))
    try:
        code, found, output = failing(checkout, [mutant.tests])
    finally:
        file.write_text(source)
    if code not in (0, 1):
        raise SystemExit(f"{mutant.name}: {mutant.tests} could not be run\n{output[-2000:]}")
    return found[0] if code == 1 else None


def main() -> int:
    """Try the mutants that are named, or all; return the exit code."""
    words = sys.argv[1:] or [""]
    # an import in a fork must find the copy
    sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (CHECKOUT, CHECKOUT / "tests")]
    import_libraries()
    chosen = [mutant for mutant in MUTANTS if any(word in mutant.name for word in words)]
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="stylefast-mutants-") as folder:
        checkout = copy_checkout(Path(folder))
        code, found, output = failing(checkout, sorted({mutant.tests for mutant in chosen}))
        if code != 0:
            raise SystemExit(f"without a mutant: {', '.join(found) or 'no test ran'}\n{output[-2000:]}")
        print("| mutant | caught by | seconds |\n|---|---|---|", flush=True)
        for mutant in chosen:
            start = time.monotonic()
            test = caught_by(checkout, mutant)
            survivors += test is None
            shown = f"`{test}`" if test else f"nothing: {mutant.why}"
            print(f"| {mutant.name} | {shown} | {time.monotonic() - start:.0f} |", flush=True)
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
