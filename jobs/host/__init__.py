"""The ground floor: errors, files, locks, secrets, processes, the console. Imports nothing of ours."""
