"""`shoal top`: what expert nodes are doing now, from their /metrics."""
