"""The paper's claims and this project's defaults, measured on a pretrained chat model over natural text.

Units, ledger and drawing are those of ``research.evidence``.
"""
