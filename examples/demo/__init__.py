"""The demo, `python -m examples.demo`: a small real model reads a long text, all or part of it.

model    loads the model, holds its KV cache, hooks attention into it
text     the text, the needle in it, and where the tokens are
measure  reads on and answers, with one way of attention after the other
picture  draws what one query selected, as one HTML file
"""
