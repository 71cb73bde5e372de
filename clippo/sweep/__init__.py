"""The sweep: what is searched, how, and where the results go.

Nothing is imported here: the process of a trial needs ``trial`` and none of what searches.
"""
