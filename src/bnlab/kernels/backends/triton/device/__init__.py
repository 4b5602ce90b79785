"""The code that runs on a GPU. Importing a module of this package needs Triton."""
