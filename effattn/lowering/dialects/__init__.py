"""How a term is printed and a kernel is loaded; one folder for each language of kernels."""
