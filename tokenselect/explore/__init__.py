"""The explorer: one HTML page of what each decode step read, `python -m tokenselect.explore`.

record  lets a model read a text, the last tokens one by one with selection, and keeps each call
page    puts the calls into one page, page.html with page.css and page.js, that needs nothing else

The page selects by itself, at any setting, from the votes as the reference computed them.
"""
