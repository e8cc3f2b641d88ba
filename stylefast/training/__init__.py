"""Training of LoRAs for SDXL-shaped models: pictures with captions in, a file for `engine.loras.add` out."""
