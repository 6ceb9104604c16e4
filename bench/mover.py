"""The Mover of a node, as a process: ``python -m bench.mover FOLDER ENDPOINT BUCKET NODE DATABASE``, until its standard input ends."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from storage.mover import Mover
from storage.s3 import S3Store
from tests.storage.house import build


def main() -> None:
    """Bring what lands, as the role of the node does."""
    folder, endpoint, bucket, node_id, database_url = sys.argv[1:]
    store = S3Store(bucket=bucket, endpoint_url=endpoint, region="us-east-1")
    house = build(Path(folder), store=store, node_id=node_id, database_url=database_url)
    stop = threading.Event()
    worker = threading.Thread(target=Mover(archive=house.archive, queue=house.queue, wait=house.database.changed).run, args=(stop,))
    worker.start()
    sys.stdin.buffer.read()
    stop.set()
    worker.join()
    house.close()


if __name__ == "__main__":
    main()
