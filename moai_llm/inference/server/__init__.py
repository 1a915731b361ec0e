"""A model over HTTP, in the shapes of OpenAI's API, and a page to talk to it.

    options.py    what the operator chose, checked           worker.py     the thread in which the engine lives
    protocol.py   what a request may hold                    answers.py    one request: admitted, run, ended in time
    body.py       bytes to such a request, or why not        text.py       tokens to text, stop strings, log-probabilities
    shapes.py     what an answer looks like                  sse.py        a stream of events, cut when nobody listens
    app.py        the routes                                 guard.py      who may come in, what every answer carries
    metrics.py    numbers for Prometheus                     run.py        sockets, signals, the end
    scoring.py    log-probabilities of a prompt              page/         the chat page, served as it lies there

Nothing here is imported before `require("fastapi", "serve")` has said what is missing.
"""
