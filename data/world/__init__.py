"""The embedded world: generated instructions, text, labelers, and a judge that knows the true quality."""
