"""The stages of the pipeline, one module each; every one reads top to bottom like the algorithm."""
