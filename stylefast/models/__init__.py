"""Parts of an SDXL model (UNet, text encoders, VAE, image encoder, adapters) and their loaders."""
