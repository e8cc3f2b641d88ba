"""The tests of `make smoke`, which have the marker `smoke`, each after what it stands for."""

SMOKE = (
    # no module imports one of a higher layer
    "tests/packaging/test_import_direction.py",
    # a Triton kernel runs, interpreted
    "tests/kernels/test_interpreted_layer_norm.py::test_a_constant_row_gives_the_bias",
    # the UNet on the C++ kernels is diffusers' UNet
    "tests/oracle/test_fused_unet.py::test_plain_rows_equal_diffusers",
    # decoding is planned to fit into memory
    "tests/models/test_vae_tiles.py::test_a_batch_is_cut_to_2048_pixels_square_even_where_more_fits",
    # a plain guided picture is that of diffusers
    "tests/engine/test_plain.py::test_a_negative_prompt_equals_diffusers",
    # three styles in one request are the literal computation
    "tests/engine/test_requests.py::test_three_styles_compose_in_one_request[first_prompt]",
    # a baked style is kept in a file and read again
    "tests/engine/test_banks.py::test_a_saved_bank_gives_the_same_bits",
    # a submitted job is done by the engine's thread
    "tests/engine/test_jobs.py::test_a_job_gives_what_generate_gives",
    # the command line writes a picture and makes it again from its record
    "tests/cli/test_generate.py::test_from_makes_the_same_pixels_again[all three]",
)
