"""Things that run. The only place where pipeline and models meet. Start reading at cli.py."""
