"""Recommenders: tensors in, scores out; single-device code. Start reading at interface.py."""
