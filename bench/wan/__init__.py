"""Speculation behind a home link: SmolLM2's experts on two nodes, a long way off."""
