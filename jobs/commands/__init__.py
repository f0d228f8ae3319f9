"""The subcommands of `solar`: their arguments, and which job they start."""
