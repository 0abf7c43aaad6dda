"""Check every call of a policy and turn its faults into named errors."""
