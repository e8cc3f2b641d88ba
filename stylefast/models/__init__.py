"""The parts of an SDXL model: UNet, text encoders, VAE, image encoder, adapters, and how they are loaded."""
