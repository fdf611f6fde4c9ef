"""Calls between processes of one machine by Unix sockets, where a call of a Ray actor is too slow.

A Ray actor's call takes about 1.5 ms from end to end, a call here 0.1 to 0.2 ms. Every actor that
has such a door can be called through Ray as well: a process that cannot reach the socket does that.
"""
