"""Serve a model over HTTP with the OpenAI API. Needs the extra ``serve``."""
