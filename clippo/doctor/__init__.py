"""Looks for what would stop a sweep, before machines are paid for: store, model, pictures, cluster, memory.

Also what a sweep would take, from a short real trial on the cluster.
"""

from clippo.doctor.examine import WORKER_WAIT, examine
from clippo.doctor.finding import Finding, print_findings

__all__ = ["WORKER_WAIT", "Finding", "examine", "print_findings"]
