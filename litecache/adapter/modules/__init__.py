"""Modules of the caller's process: which can be served as they are, and what is saved of them."""
