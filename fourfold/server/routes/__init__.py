"""The endpoints: each file holds its request's fields, its handler, and what it answers with."""
