"""Registered models at work: requests in files scored and ranked, users' states built and read."""
