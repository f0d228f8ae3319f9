"""One training job inside its workers. Start reading at loop.py."""
