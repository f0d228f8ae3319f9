"""The code stored with a registered model. It needs only torch, numpy, pandas, pyarrow and safetensors, and of this
project imports only models/."""
