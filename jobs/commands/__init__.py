"""The subcommands of `solar`: each reads its arguments and calls one function of the other packages."""
