"""Figures of Sarathi-Serve (OSDI'24) for any simulated machine: pure functions give series, `drawing` draws them."""
