"""The HTTP server: the API people speak, in front of an `EngineClient`.

    run.py (one listener, signals) ─▶ app.py ─▶ gate.py (keys, origins) ─▶ call.py (one request)
        ─▶ routes/*.py ─▶ generation.py (prompt to pieces) ─▶ EngineClient

Contract: knows requests, text and the client's protocol; never the engine, never torch. Every accepted
request ends exactly once, every queue and wait has a bound that settings.py names, and what is not
supported is refused by name. docs/RELIABILITY.md lists the promises.
"""
