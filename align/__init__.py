"""InstructGPT's three stages as a library: maths, rollouts, updates, checkpoints. See docs/ and stages/."""

__version__ = "0.1.0"
