"""The contracts and the loop. Knows no model family, no concrete policy, no text."""
