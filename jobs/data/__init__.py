"""What `solar import`, `prepare`, `inspect`, `compact`, `forget` and `gc` do: data sets made, looked at, maintained."""
