"""Turn a preset, a YAML file or a dictionary into one sparsifier and one compressor per layer."""
