"""KEEP: the part file of one download, from its creation beside the destination to the rename over it.

Knows neither the states of jobs nor the network: it is given bytes and positions, or a socket and a number of bytes. Which
identity touches the file is a parameter, the `TokenExecutor`; nothing here ever runs as somebody else.

`part` is the door and the line of a byte: `PartFile.append` or `receive` (`intake`), the write, what is known of the bytes (`hashes`,
`reservation`), `sync`, `commit` (`rename`). `batches` does it for many small files, `leftovers` finds and deletes what nobody has open.

**Names.** The directory is opened once and every call is relative to that descriptor. A name in it is nobody's promise: somebody
else may have put another file there. So device and inode decide whether a file is ours, before it is reopened, replaced, renamed
or deleted, and once more after the rename (T15, T17). No finalizer touches a path.

**Power.** What the journal says of a file is true after a loss of power, in this order: the name of a part file is journalled before
the file is made (`names.new_draft`), so nothing is left that nobody knows of; bytes are synced, and the name of their file once, before
their position is journalled (`PartFile.sync`); the whole file is synced before it is renamed, and the directory after that, before the
journal calls it committed (`PartFile.commit`); a removed name is synced before the journal forgets it (`leftovers.discard_part`).
What is not synced may be there or not, in part or as zeros: it is never counted, and cut off when the file is opened in another boot.

**Threads.** Each call is one hop to a thread of the token, and a cancel waits for that thread. A thread that does not come back
in time is given up on together with the part file: its descriptors stay open until the thread leaves them (`hops.Handles`), every
later call fails, and this process does not reopen the file meanwhile. So the calls that own a descriptor or change a file go
through `TokenExecutor.run`. aiofiles, on the executor's own pool, carries the one that only looks (`length`): it returns
from a cancel at once, and what it leaves behind does no harm. Its file objects are not used: their position is state between two
hops, and `async with` closes them on another thread.

**Many at once.** Files that came whole need no part file while they are fetched: `store_whole` makes, writes and syncs a batch of them in
one hop, and `commit_parts` renames one, each directory opened, looked at and synced once. They keep every promise above for each file, and
stop at the first that is not as it should be: what is wrong with it is said when it is tried alone.
"""
