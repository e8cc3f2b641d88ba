"""Style banks: baking, and their pages in host and device memory."""
