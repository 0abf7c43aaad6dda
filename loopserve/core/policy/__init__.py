"""Define the interfaces that policies implement, their registry and the patterns they return."""
