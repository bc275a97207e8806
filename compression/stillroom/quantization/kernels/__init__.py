"""What multiplies with packed weights: LLVM code on a CPU, Triton on a GPU, torch anywhere."""
