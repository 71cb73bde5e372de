"""``python -m clippo`` is the ``clippo`` program."""

from clippo.cli import main

main()
