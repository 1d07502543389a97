"""The student's blocks and their cells: each computation plain, and beside it the kernels of a GPU."""
