"""Pure functions of tensors. Imports torch and the standard library's pure parts, nothing else.

Legend: B episodes or prompts, K completions of a prompt, R response tokens, T tokens, V vocabulary.
Losses return sums; the caller divides once, by the global count.
"""
