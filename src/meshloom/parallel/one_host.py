"""The meeting of an elastic agent that is alone: nobody to wait for, so no threads, no files and no random pauses."""

from __future__ import annotations

import socket

from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

NAME = "one-host"
_HOST = "127.0.0.1"


class OneHost(RendezvousHandler):
    """Gives the agent a store of its own and rank 0 a free port, new ones each time that ranks are started."""

    def __init__(self, params: RendezvousParameters) -> None:
        self._run_id, self._store, self._round = params.run_id, HashStore(), 0

    def get_backend(self) -> str:
        """The name by which torch's agent asks for this."""
        return NAME

    @property
    def use_agent_store(self) -> bool:
        """Rank 0 serves the ranks' store itself: an agent that forks must have no threads of C++."""
        return False

    def next_rendezvous(self) -> RendezvousInfo:
        """The only agent, and where its ranks meet."""
        self._round += 1
        with socket.socket() as one:
            one.bind((_HOST, 0))
            port = one.getsockname()[1]
        where = RendezvousStoreInfo(_HOST, port)
        return RendezvousInfo(PrefixStore(f"round {self._round}", self._store), 0, 1, where)

    def is_closed(self) -> bool:
        """Never: it ends with the agent."""
        return False

    def set_closed(self) -> None:
        """Nothing is open."""

    def num_nodes_waiting(self) -> int:
        """Nobody else comes."""
        return 0

    def get_run_id(self) -> str:
        """The id of the run."""
        return self._run_id

    def shutdown(self) -> bool:
        """Nothing is left to end."""
        return True
