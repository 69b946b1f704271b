"""Adaptive sparse attention in the models of other libraries. Each file needs its library, and nothing imports them."""
