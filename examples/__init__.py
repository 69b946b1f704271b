"""Runnable examples of asa_ops."""
