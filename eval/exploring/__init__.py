"""The page of `eval.explore`.

uploads.py   what is read of a file and of a text that somebody gives, and why not
index.py     a set as a model sees it: the nearest of all, exactly
opened.py    a model, and what is asked of it, one question at a time
show.py      what was found as HTML, in which no text of others is markup
page.py      the tabs
server.py    who may reach the page, and what of it
"""
