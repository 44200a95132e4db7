"""The float64 oracle of every op: slow, plain, and what tests hold the kernels against."""
