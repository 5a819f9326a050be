"""Batch-invariant mode: ATen's operators on invariant kernels, in eager and in compiled graphs."""
