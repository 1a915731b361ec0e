"""A model over HTTP, in the shapes of OpenAI's API, and a page to talk to it.

    options.py    what the operator chose, checked       service.py   the model, the places in the queue
    protocol.py   what a request may hold                worker.py    the thread in which the engine lives
    body.py       bytes to such a request, or why not    answers.py   one request: admitted, run, ended in time
    generate.py   the two routes that generate           text.py      tokens with their text and log-probabilities
    shapes.py     what an answer looks like              scoring.py   log-probabilities of a prompt
    app.py        the routes                             sse.py       a stream of events, cut when nobody listens
    errors.py     errors in OpenAI's shape               guard.py     who may come in, what every answer carries
    metrics.py    numbers for Prometheus                 run.py       sockets, signals, the end
    page/         the chat page, served as it lies there

Nothing here is imported before `require("fastapi", "serve")` has said what is missing.
"""
