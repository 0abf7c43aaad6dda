"""The sections of the page, one file each: ``section`` gives the text and the verdicts from the rows."""
