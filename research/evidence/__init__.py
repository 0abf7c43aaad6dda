"""The paper's claims, tested on the bundled model: ``python -m research.evidence`` (docs/evidence.md).

One experiment is one file: what is measured, and what the page says of it. A *unit* is a piece of an experiment that is run
and stored as a whole; units of all experiments are shared among processes. The page knows nothing but stored rows, so
every figure in it can be had again from them.
"""
