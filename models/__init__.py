"""Recommenders: tensors in, scores out; code for a single device. Start reading at interface.py."""
