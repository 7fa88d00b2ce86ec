"""What is made of measurements: comparisons, a plot, and the formats of other benchmarks."""
