"""RunConfig: what a run depends on, and how it is read from recipes, files and the command line."""
