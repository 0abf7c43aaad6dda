"""Evidence behind the defaults and training of the bundled model; not part of the wheel."""
