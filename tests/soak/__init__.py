"""The promises of the server as scripts: ``python -m tests.soak NAME``. The suite runs each with fewer cases."""
