"""Pure tensor functions and their kernels. They see tensors and numbers, never a config."""
