"""The demo, `python -m examples.demo`: a small real model reads a long text, all or part of it.

story    from beginning to end
model    loads the model
text     the text, the needle in it, and where the tokens are
measure  reads on and answers, with one way of attention after the other
picture  draws what one query selected, as one HTML file

The model attends through `tokenselect.integrations.transformers`: `enable`, `TokenSelectCache`, and
`recorded` for what was selected.
"""
