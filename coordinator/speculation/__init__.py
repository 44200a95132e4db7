"""Exact speculation: drafters guess tokens, one pass of the target verifies them all."""
