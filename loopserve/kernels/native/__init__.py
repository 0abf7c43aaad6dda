"""Build, load and call the compiled CPU kernels."""
