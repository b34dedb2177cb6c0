"""The kernels: tensors in, tensors out. No module, no file and no model is known here."""
