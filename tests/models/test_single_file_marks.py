"""What a single file says of itself in its keys and metadata decides how it is sampled, or is refused or said."""

import logging

import pytest
import torch
from safetensors.torch import save_file

from stylefast.errors import ModelFormatError
from stylefast.models.checkpoint import load_components
from stylefast.models.single_file_marks import (
    SDXL_SCHEDULER_CONFIG,
    check_marks,
    marked_scheduler,
    marked_size,
    marked_vae,
)
from stylefast.models.weight_files import read_header
from tests.support.small_checkpoints import write_folder, write_single_file
from tests.support.small_sdxl import small_pipeline

EMPTY = torch.zeros(0)


@pytest.fixture
def header(tmp_path):
    def write(metadata=None, **tensors):
        file = tmp_path / "model.safetensors"
        save_file({"model.diffusion_model.x": torch.zeros(1), **tensors}, file, metadata=metadata)
        return read_header(file)

    return write


def scheduler(header, **wanted):
    found = marked_scheduler(header)
    assert {key: found.get(key) for key in wanted} == pytest.approx(wanted)


def test_a_file_without_marks_is_sdxl(header):
    scheduler(header(), **SDXL_SCHEDULER_CONFIG)
    assert marked_vae(header()) == {} and marked_size(header()) is None


def test_keys_tell_v_prediction_zero_snr_and_edm(header):
    scheduler(header(v_pred=EMPTY), prediction_type="v_prediction", rescale_betas_zero_snr=None)
    scheduler(header(v_pred=EMPTY, ztsnr=EMPTY), prediction_type="v_prediction", rescale_betas_zero_snr=True)
    cosxl = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor([0.003])}
    scheduler(
        header(**cosxl),
        _class_name="EDMEulerScheduler",
        prediction_type="v_prediction",
        sigma_max=120.0,
        sigma_min=0.003,
        sigma_data=1.0,
    )
    playground = header(edm_mean=torch.tensor([-1.5, 2.0, -1.0, 2.5]).view(1, 4, 1, 1), edm_std=torch.full((4,), 8.0))
    scheduler(playground, _class_name="EDMDPMSolverMultistepScheduler", prediction_type="epsilon", sigma_data=0.5)
    assert marked_vae(playground) == {
        "latents_mean": [-1.5, 2.0, -1.0, 2.5],
        "latents_std": [8.0] * 4,
        "scaling_factor": 0.5,
    }


@pytest.mark.parametrize("key", ["modelspec.prediction_type", "modelspec.predict_key"])
def test_metadata_tell_what_the_model_predicts(header, key):
    scheduler(header({key: "v"}), prediction_type="v_prediction")
    scheduler(header({key: "epsilon"}), prediction_type="epsilon")
    with pytest.raises(ModelFormatError, match="prediction type 'flow'.*'epsilon' and 'v'"):
        marked_scheduler(header({key: "flow"}))


def test_where_keys_and_metadata_differ_the_keys_count_and_it_is_said(header, caplog):
    with caplog.at_level(logging.WARNING):
        scheduler(header({"modelspec.prediction_type": "epsilon"}, v_pred=EMPTY), prediction_type="v_prediction")
    assert "the keys are used" in caplog.text


def test_a_config_folder_that_contradicts_the_file_is_refused(header):
    v_prediction = {**SDXL_SCHEDULER_CONFIG, "prediction_type": "v_prediction"}
    assert marked_scheduler(header(), v_prediction)["prediction_type"] == "v_prediction"
    assert marked_scheduler(header(v_pred=EMPTY), v_prediction)["prediction_type"] == "v_prediction"
    with pytest.raises(ModelFormatError, match="declares v_prediction for sampling, .*has epsilon"):
        marked_scheduler(header(v_pred=EMPTY), SDXL_SCHEDULER_CONFIG)
    with pytest.raises(ModelFormatError, match="declares v_prediction in EDM's form"):
        marked_scheduler(header(**{"edm_vpred.sigma_max": torch.tensor(120.0)}), v_prediction)


def test_the_resolution_is_the_native_size(header):
    assert marked_size(header({"modelspec.resolution": "512x768"})) == [96, 64]
    assert marked_size(header({"modelspec.resolution": "512"})) is None


@pytest.mark.parametrize(
    "kind", ["stable-diffusion-xl-v1-refiner", "stable-diffusion-xl-v1-base/lora", "stable-diffusion-xl-v1-edit"]
)
def test_a_file_that_calls_itself_something_else_is_refused(header, kind):
    check_marks(header({"modelspec.architecture": "stable-diffusion-xl-v1-base"}))
    with pytest.raises(ModelFormatError, match=f"call it '{kind}'"):
        check_marks(header({"modelspec.architecture": kind}))


def test_half_of_edms_marks_is_refused(header):
    with pytest.raises(ModelFormatError, match="only one of edm_mean and edm_std"):
        check_marks(header(edm_mean=torch.zeros(4)))


def test_what_is_left_out_or_not_done_is_said_and_what_training_left_is_not(header, caplog):
    left = {"denoiser.sigmas": EMPTY, "model_ema.x": EMPTY, "alphas_cumprod": EMPTY, "sqrt_alphas_cumprod": EMPTY}
    with caplog.at_level(logging.WARNING):
        check_marks(header({"modelspec.title": "a", "ss_steps": "3", "modelspec.timestep_range": "0, 1000"}, **left))
        assert not caplog.records
        check_marks(
            header(
                {"modelspec.encoder_layer": "1", "modelspec.timestep_range": "0,200"},
                **{"conditioner.embedders.2.w": EMPTY},
            )
        )
    assert "layer '1'" in caplog.text and "'0,200'" in caplog.text and "conditioner.embedders.2.w" in caplog.text


def test_a_playground_file_is_loaded_as_one(tmp_path):
    pipeline = small_pipeline(seed=3)
    folder = write_folder(pipeline, tmp_path / "config")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    marks = {"edm_mean": torch.arange(4.0), "edm_std": torch.arange(1.0, 5.0)}
    path = write_single_file(pipeline, tmp_path / "model.safetensors", extra=marks)
    components = load_components(path, config=folder)
    assert components.scheduler_config["_class_name"] == "EDMDPMSolverMultistepScheduler"
    assert components.vae.config["latents_mean"] == [0.0, 1.0, 2.0, 3.0]
    with pytest.raises(ModelFormatError, match="latents_mean"):
        load_components(path, config=folder, vae=pipeline.vae)
