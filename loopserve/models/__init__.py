"""The only package that imports transformers: the bridge to its models, chat templates, and the bundled model."""
