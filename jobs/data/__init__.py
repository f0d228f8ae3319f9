"""The work of `solar import`, `prepare`, `inspect`, `compact`, `forget` and `gc`: make, show and maintain data sets."""
