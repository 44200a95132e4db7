"""Kinds of attention, a page each."""
