"""The lowest layer: errors, files, locks, secrets, processes, the console. Imports no other package of this project."""
