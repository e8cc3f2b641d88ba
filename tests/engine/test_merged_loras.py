"""What `engine.loras` was before there were LoRAs per request."""

import pytest

import stylefast as sf


def test_members_of_the_merged_loras_are_still_found_where_they_were():
    with sf.Engine.from_pretrained("tiny") as engine:
        name = engine.load_lora(engine.lora_files()["gold"], 0.5)
        with pytest.warns(DeprecationWarning, match=r"engine.loras.touched is now engine.merged_loras.touched"):
            assert engine.loras.touched == engine.merged_loras.touched != ()
        with pytest.warns(DeprecationWarning):
            engine.loras.set_scale(name, 0.25)
        assert engine.merged_loras.scales == {name: 0.25}
        with pytest.warns(DeprecationWarning):
            engine.loras.clear()
        assert not engine.merged_loras.scales and not hasattr(engine.loras, "nothing")
