"""All that one step of a batch reads and writes, in buffers that stay in place."""
