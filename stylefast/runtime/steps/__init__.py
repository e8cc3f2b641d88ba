"""The inputs and outputs of one step of a batch, in buffers with fixed addresses."""
