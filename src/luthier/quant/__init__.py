"""One file per quantization_method: how a base model is kept in few bits, or read where it was stored in few bits."""
