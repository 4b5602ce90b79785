"""What several benchmarks share: the networks and steps that they time, how they time, and how they combine figures."""
