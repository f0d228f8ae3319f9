"""What travels with a registered model: torch, numpy, pandas, pyarrow and safetensors only. Imports models alone."""
