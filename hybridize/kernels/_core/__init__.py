"""What all ops share: which implementation runs, how Triton kernels are launched, how an op is described for tests and bench."""
