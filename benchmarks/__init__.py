"""The benchmarks of bnlab: one script a benchmark (`bnlab bench NAME`), and packages for what several scripts share."""
