"""`gptdist serve`: a trained model behind OpenAI's HTTP interface, with a page to talk to it.

    pages.py    the paged key/value cache as a pool that requests share
    engine.py   continuous batching: which rows are computed next, on a thread of its own
    schema.py   what a request may say
    app.py      the HTTP interface; page.html is what a browser gets
    command.py  opens a checkpoint and runs the server
"""
