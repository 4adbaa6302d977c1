"""A command that looks at itself, and what it saw."""

from pathlib import Path

CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")

# What a command finds out about itself: `$$` is the command. Subshells, because dash redirects and blocks signals in itself
# while it starts a program.
LOOK = """
at=$(readlink /proc/$$/cwd); cd "$1" || exit 9
(cat /proc/$$/status > status; :); (cat /proc/$$/cmdline > cmdline; :); (ls -l /proc/$$/fd > fds; :); cat /proc/$$/environ > environ
cat /proc/$$/stat > stat; echo $at > cwd; umask > umask; echo done > done
"""


class Seen:
    """What `LOOK` wrote."""

    @staticmethod
    def is_whole(directory: Path) -> bool:
        """The command has written all."""
        return (directory / "done").exists() and (directory / "done").read_text() == "done\n"

    def __init__(self, directory: Path) -> None:
        assert self.is_whole(directory)
        self.owner = (directory / "done").stat().st_uid
        lines = (line.partition(":") for line in (directory / "status").read_text().splitlines())
        self.status = {name: value.split() for name, _, value in lines}
        listed = [line.partition(" -> ") for line in (directory / "fds").read_text().splitlines() if " -> " in line]
        self.descriptors = {int(before.split()[-1]): target for before, _, target in listed}
        variables = (text.partition("=") for text in (directory / "environ").read_text().split("\0") if text)
        self.environment = {name: value for name, _, value in variables}
        numbers = (directory / "stat").read_text().rpartition(")")[2].split()
        self.pid = int((directory / "stat").read_text().split()[0])
        self.group, self.session, self.terminal = map(int, numbers[2:5])
        self.arguments = (directory / "cmdline").read_text().split("\0")[:-1]
        self.cwd = (directory / "cwd").read_text().strip()
        self.umask = int((directory / "umask").read_text(), 8)

    def capabilities(self) -> dict[str, int]:
        return {name: int(self.status[name][0], 16) for name in CAPABILITIES}
