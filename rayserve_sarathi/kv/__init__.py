"""Paged KV blocks: which request owns which, and which are shared."""
