"""Public test tools for our tests and for plugin authors: inputs, a scripted conversation, assertions, strategies,
docs tables.
"""
