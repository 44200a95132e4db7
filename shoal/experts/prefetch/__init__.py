"""Guesses which experts the next call will want, and has them read while the disk is idle.

`interface.py` says what the executor calls and what the store must offer. The cores (`pregate`,
`markov`, `locality`, `fusion`, `calibration`, `admission`, `governor`) take times as arguments;
`prefetcher.py` is the shell. Nothing here ever touches a token: a wrong guess costs time only.
"""
