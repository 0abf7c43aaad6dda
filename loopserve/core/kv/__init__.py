"""Store the KV pairs of one session and the selections made from them."""
