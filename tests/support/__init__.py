"""What tests share: small logs and worlds, processes to run and to kill, and reference computations."""
